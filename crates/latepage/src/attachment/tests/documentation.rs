//! The examples of `docs/handshake.md` are handshakes.

use super::super::{Fed, Incoming};
use super::{sealed, userfaultfd};
use crate::delivery::channel::Channel;

const PAGE: &str = include_str!("../../../../../docs/handshake.md");

/// The blocks of JSON on the page.
fn examples() -> Vec<&'static str> {
    PAGE.split("```json\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect()
}

#[test]
fn every_example_on_the_page_is_a_handshake() {
    let examples = examples();
    assert!(examples.len() >= 4, "{examples:?}");
    for example in examples {
        let count = example.matches("\"userfaultfd\"").count().max(1);
        let Some(descriptors) = (0..count).map(|_| userfaultfd()).collect() else { return };
        if example.contains("\"channel\"") {
            let channel = Channel::new(64, 65536).unwrap();
            let (memory, bell) = channel.descriptors();
            let sent = vec![
                memory.try_clone_to_owned().unwrap(),
                bell.try_clone_to_owned().unwrap(),
                sealed(1 << 33),
            ];
            assert!(matches!(Incoming::new().feed(example.as_bytes(), sent), Fed::Done(_)), "{example}");
            continue;
        }
        let mut incoming = Incoming::new();
        let done = match incoming.feed(example.as_bytes(), descriptors) {
            // It announces a memory file too.
            Fed::More => incoming.feed(b"", vec![sealed(1 << 33)]),
            done => done,
        };
        assert!(matches!(done, Fed::Done(_)), "{example}\n{done:?}");
    }
}
