//! Processes of their own: a VMM that can be killed, and tests that count what their process holds.
//!
//! Both are this test binary again, told by its environment to run one test and nothing else.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use latepage::attachment::{Backing, Form};
use latepage::sys::uffd::Userfaultfd;

use super::guest::{Guest, Make, say};
use super::serving::Directory;

const CONTROL: &str = "LATEPAGE_TEST_VMM";
const ALONE: &str = "LATEPAGE_TEST_ALONE";

/// A VMM in a process of its own, that does what it is told, line by line.
pub struct Vmm {
    process: Child,
    control: BufReader<UnixStream>,
    _directory: Directory,
}

impl Vmm {
    /// Starts one. The test binary must have a test `vmm_process` that calls [`obey`].
    pub fn start() -> Self {
        let directory = Directory::new();
        let path = directory.file("c");
        let listener = UnixListener::bind(&path).unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "vmm_process", "--test-threads=1"])
            .env(CONTROL, &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(super::BOUND)).unwrap();
        Self { process, control: BufReader::new(stream), _directory: directory }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Says a line and waits for the answer to it.
    pub fn tell(&mut self, line: &str) -> String {
        self.say(line);
        self.hear()
    }

    pub fn say(&mut self, line: &str) {
        writeln!(self.control.get_mut(), "{line}").unwrap();
    }

    pub fn hear(&mut self) -> String {
        let mut answer = String::new();
        self.control.read_line(&mut answer).expect("the VMM gives no answer");
        answer.trim().to_owned()
    }

    pub fn kill(&mut self) {
        let _ = self.process.kill();
    }

    /// Waits for its end, and returns the signal that ended it.
    pub fn ended_by(&mut self) -> Option<i32> {
        // It says nothing more, and its socket is closed by its end.
        loop {
            match self.control.read_line(&mut String::new()) {
                Ok(0) => break,
                Ok(_) => {}
                // What we had said and it never read.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
                Err(error) => panic!("the VMM lives on: {error}"),
            }
        }
        self.process.wait().unwrap().signal()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
        let _ = self.process.wait();
    }
}

/// The VMM's side: does nothing unless this process was started as one.
pub fn obey() {
    let Some(path) = std::env::var_os(CONTROL) else { return };
    let stream = UnixStream::connect(path).unwrap();
    let mut answers = stream.try_clone().unwrap();
    let mut guest: Option<Guest> = None;
    let mut sockets = Vec::new();
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { break };
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words[at].parse::<usize>().unwrap();
        let answer = match words[0] {
            "guest" => {
                let shards = if words.len() > 3 { number(3) } else { 1 };
                let make = Make { shards, ..Make::new(Backing::from_name(words[1]).unwrap(), number(2)) };
                guest = Some(make.build());
                "ok".to_owned()
            }
            // With one userfaultfd fewer than announced.
            "connect-short" => {
                let guest = guest.as_ref().unwrap();
                let mut sent: Vec<_> = guest.userfaultfds().collect();
                sent.pop();
                sockets.push(guest.connect_with(Path::new(words[1]), words[2], &sent));
                "ok".to_owned()
            }
            // With each userfaultfd in another one's place.
            "connect-turned" => {
                let guest = guest.as_ref().unwrap();
                let mut sent: Vec<_> = guest.userfaultfds().collect();
                sent.rotate_left(1);
                sockets.push(guest.connect_with(Path::new(words[1]), words[2], &sent));
                "ok".to_owned()
            }
            // With one that was never set up in the first one's place.
            "connect-unset" => {
                let guest = guest.as_ref().unwrap();
                let unset = unset();
                let mut sent: Vec<_> = guest.userfaultfds().collect();
                sent[0] = unset.as_fd();
                sockets.push(guest.connect_with(Path::new(words[1]), words[2], &sent));
                "ok".to_owned()
            }
            // With another process's, which comes from the socket of the last word, in the first one's place.
            "connect-borrowed" => {
                let guest = guest.as_ref().unwrap();
                let lender = UnixStream::connect(words[3]).unwrap();
                let borrowed = super::received(&lender);
                let mut sent: Vec<_> = guest.userfaultfds().collect();
                sent[0] = borrowed.as_fd();
                sockets.push(guest.connect_with(Path::new(words[1]), words[2], &sent));
                "ok".to_owned()
            }
            "connect" => {
                let form =
                    if words.get(3) == Some(&"firecracker") { Form::Firecracker } else { Form::Latepage };
                sockets.push(guest.as_ref().unwrap().connect_as(form, Path::new(words[1]), words[2]));
                "ok".to_owned()
            }
            // Anything at all, with the userfaultfd.
            "send" => {
                let guest = guest.as_ref().unwrap();
                sockets.push(say(
                    Path::new(words[1]),
                    words[2..].join(" ").as_bytes(),
                    &[guest.uffd.as_fd()],
                ));
                "ok".to_owned()
            }
            // A userfaultfd that was never set up.
            "send-unset" => {
                let uffd = unset();
                sockets.push(say(Path::new(words[1]), words[2..].join(" ").as_bytes(), &[uffd.as_fd()]));
                "ok".to_owned()
            }
            "hang-up" => {
                sockets.clear();
                "ok".to_owned()
            }
            "touch" => {
                let guest = guest.as_ref().unwrap();
                guest.view.load(number(1) * guest.page).to_string()
            }
            "discard" => {
                guest.as_ref().unwrap().discard(number(1), number(2)).join();
                "ok".to_owned()
            }
            // Threads that touch and discard everything, for ever.
            "storm" => {
                for thread in 0..number(1) {
                    let (view, pages, bytes) = {
                        let guest = guest.as_ref().unwrap();
                        (Arc::clone(&guest.view), guest.pages(), guest.page)
                    };
                    std::thread::spawn(move || {
                        for turn in 0usize.. {
                            let page = (turn * 7919 + thread * 131) % pages;
                            view.load(page * bytes);
                            if turn % 3 == 0 {
                                let _ = view.dont_need(page * bytes, bytes);
                            }
                        }
                    });
                }
                "ok".to_owned()
            }
            other => panic!("what is {other}?"),
        };
        if writeln!(answers, "{answer}").is_err() {
            break;
        }
    }
    std::process::exit(0);
}

/// A userfaultfd on which nobody has called UFFDIO_API.
fn unset() -> Userfaultfd {
    Userfaultfd::open_by_device().or_else(|_| Userfaultfd::open_by_syscall()).unwrap()
}

/// Runs `body` in a process of its own, in which nothing else runs: for counting what it holds.
pub fn alone(test: &str, body: impl FnOnce()) {
    if std::env::var(ALONE).is_ok_and(|name| name == test) {
        return body();
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ALONE, test)
        .status()
        .unwrap();
    assert!(status.success(), "{test}, in a process of its own: {status}");
}

/// What this process holds: descriptors, threads, mappings of memory files, by what /proc says.
#[derive(Debug, PartialEq, Eq)]
pub struct Holdings {
    pub descriptors: Vec<String>,
    pub threads: usize,
    pub memory_files: usize,
}

impl Holdings {
    pub fn now() -> Self {
        let list = |path| std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
        let mut descriptors: Vec<String> = list("/proc/self/fd")
            .filter_map(|path| std::fs::read_link(path).ok())
            // Names without the numbers that differ each time.
            .map(|link| link.to_string_lossy().split([':', '(']).take(2).collect::<Vec<_>>().join(":"))
            .map(|name| if name.starts_with("socket") { "socket".to_owned() } else { name })
            .filter(|name| !name.starts_with("/proc"))
            .collect();
        descriptors.sort();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        Self {
            descriptors,
            threads: list("/proc/self/task").count(),
            memory_files: maps.lines().filter(|line| line.contains("memfd:")).count(),
        }
    }
}
