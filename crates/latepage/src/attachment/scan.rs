//! Where a JSON document ends, found as its bytes arrive.
//!
//! A handshake has no length in front and no terminator, so its end is where its outermost bracket closes. Every byte is
//! looked at once: a peer that sends a megabyte byte by byte costs no more than one that sends it whole. The grammar is
//! left to the parser, which runs once, when the document is whole.

use super::{Form, MAX_NESTING, RefusalReason};

/// How far into a document we are.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    /// Told by the first byte that is no space.
    form: Option<Form>,
    depth: usize,
    in_string: bool,
    escaped: bool,
    closed: bool,
}

impl Scanner {
    /// Which form it is, once that is known.
    pub(super) fn form(&self) -> Option<Form> {
        self.form
    }

    /// Whether the outermost bracket is closed.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Takes the next bytes.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<(), RefusalReason> {
        for (at, &byte) in bytes.iter().enumerate() {
            if self.in_string {
                self.string_byte(byte);
            } else if matches!(byte, b' ' | b'\t' | b'\r' | b'\n') {
                continue;
            } else if self.closed {
                return Err(RefusalReason::Trailing { bytes: bytes.len() - at });
            } else {
                self.byte(byte)?;
            }
        }
        Ok(())
    }

    fn string_byte(&mut self, byte: u8) {
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' => self.escaped = true,
            b'"' => self.in_string = false,
            _ => {}
        }
    }

    fn byte(&mut self, byte: u8) -> Result<(), RefusalReason> {
        if self.form.is_none() {
            self.form = Some(match byte {
                b'[' => Form::Firecracker,
                b'{' => Form::Latepage,
                _ => return Err(RefusalReason::NeitherForm { start: printable(byte) }),
            });
        }
        match byte {
            b'[' | b'{' => {
                self.depth += 1;
                if self.depth > MAX_NESTING {
                    return Err(RefusalReason::Deep);
                }
            }
            // Which kind of bracket closes which is the parser's business. The depth is at least 1 here: the first byte
            // opened a bracket, and after the last closed one nothing but spaces comes this far.
            b']' | b'}' => {
                self.depth -= 1;
                self.closed = self.depth == 0;
            }
            b'"' => self.in_string = true,
            _ => {}
        }
        Ok(())
    }
}

fn printable(byte: u8) -> String {
    if byte.is_ascii_graphic() { format!("\"{}\"", char::from(byte)) } else { format!("byte {byte:#04x}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(text: &[u8]) -> Result<bool, RefusalReason> {
        let mut scanner = Scanner::default();
        scanner.feed(text)?;
        Ok(scanner.is_closed())
    }

    #[test]
    fn brackets_in_strings_close_nothing() {
        assert!(!scan(br#"{"a]}": "\"}]"#).unwrap());
        assert!(scan(br#"{"a]}": "\"}]\\"}"#).unwrap());
    }

    #[test]
    fn the_first_byte_tells_the_form() {
        for (text, form) in [(&b" \n["[..], Form::Firecracker), (&b"\t{"[..], Form::Latepage)] {
            let mut scanner = Scanner::default();
            scanner.feed(text).unwrap();
            assert_eq!(scanner.form(), Some(form));
        }
        for text in [&b"x"[..], b"\"[]\"", b"1", b"\xef\xbb\xbf[]", b"]"] {
            assert!(matches!(scan(text), Err(RefusalReason::NeitherForm { .. })), "{text:?}");
        }
    }

    #[test]
    fn what_follows_the_document_is_counted() {
        assert!(scan(b"[] \r\n\t ").unwrap());
        assert!(matches!(scan(b"[] xyz"), Err(RefusalReason::Trailing { bytes: 3 })));
        assert!(matches!(scan(b"[][]"), Err(RefusalReason::Trailing { bytes: 2 })));
    }

    #[test]
    fn nesting_ends_at_its_limit() {
        let nested = |depth: usize| [vec![b'['; depth], vec![b']'; depth]].concat();
        assert!(scan(&nested(MAX_NESTING)).unwrap());
        assert!(matches!(scan(&nested(MAX_NESTING + 1)), Err(RefusalReason::Deep)));
    }
}
