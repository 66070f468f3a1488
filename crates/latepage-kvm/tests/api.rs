//! The API socket.

mod machines;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use latepage_kvm::{ApiServer, Event, GuestKind, Vm};
use machines::{config, scratch};
use serde_json::{Value, json};

fn ask(path: &Path, requests: &[Value]) -> Vec<Value> {
    let stream = UnixStream::connect(path).unwrap();
    let mut reader = BufReader::new(&stream);
    requests
        .iter()
        .map(|request| {
            let mut writer = &stream;
            writeln!(writer, "{request}").unwrap();
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            serde_json::from_str(&line).unwrap()
        })
        .collect()
}

fn vm() -> Arc<Vm> {
    Arc::new(Vm::create(&config(GuestKind::Auto, 1)).unwrap())
}

#[test]
fn everything_can_be_asked_for_over_the_socket() {
    let directory = scratch();
    let path = directory.path().join("vm.sock");
    let vm = vm();
    let server = ApiServer::start(&vm, &path).unwrap();
    let (state, memory) = (directory.path().join("s"), directory.path().join("m"));
    let answers = ask(
        &path,
        &[
            json!({"do": "run", "job": {"action": "fill", "seed": 3}}),
            json!({"do": "wait"}),
            json!({"do": "discard", "first": 5, "count": 2}),
            json!({"do": "discard", "gpa": 2 << 20, "bytes": 4096}),
            json!({"do": "compare"}),
            json!({"do": "pause"}),
            json!({"do": "save", "state_file": state, "memory_file": memory}),
            json!({"do": "resume"}),
            json!({"do": "run", "job": {"action": "count"}}),
            json!({"do": "wait", "timeout": 0.01}),
            json!({"do": "stop"}),
            json!({"do": "report"}),
            json!({"do": "quit"}),
        ],
    );
    assert!(answers.iter().all(|answer| answer["ok"] == true), "{answers:?}");
    assert_eq!(answers[4]["result"]["wrong_pages"], 0);
    assert!(answers[9]["result"].is_null());
    assert_eq!(answers[11]["result"]["last_job"]["job"]["action"], "count");
    assert!(state.exists() && memory.exists());
    // It comes after its answer: whoever is asked to end must still have said that he will.
    while vm.next_event(Some(Duration::from_secs(60))).expect("a quit is told") != Event::Quit {}
    drop(server);
    assert!(!path.exists());
}

#[test]
fn nonsense_is_answered_and_harms_nothing() {
    let directory = scratch();
    let path = directory.path().join("vm.sock");
    let vm = vm();
    let _server = ApiServer::start(&vm, &path).unwrap();
    let answers = ask(
        &path,
        &[
            json!("x"),
            json!({"do": "jump"}),
            json!({"do": "run", "job": {"action": "fill", "colour": 3}}),
            json!({"do": "run", "job": {"action": "verify", "pages": [[1, 1_000_000]]}}),
            json!({"do": "discard", "first": 5}),
            json!({"do": "discard", "gpa": 0, "bytes": 4096}),
            json!({"do": "wait", "timeout": -1}),
            json!({"do": "save", "state_file": "/no/where", "memory_file": "/no/where/else"}),
            json!({"do": "report"}),
        ],
    );
    assert!(answers[..8].iter().all(|answer| answer["ok"] == false), "{answers:?}");
    assert!(answers[..7].iter().all(|answer| answer["kind"] == "usage"), "{answers:?}");
    assert!(answers[2]["error"].as_str().unwrap().contains("colour"));
    assert_eq!(answers[8]["result"]["status"], "running");
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_or_a_file_is_not() {
    let directory = scratch();
    let path = directory.path().join("vm.sock");
    drop(UnixListener::bind(&path).unwrap());
    let vm = vm();
    let server = ApiServer::start(&vm, &path).unwrap();
    let live = ApiServer::start(&vm, &path).unwrap_err().to_string();
    assert!(live.contains("listens there already"), "{live}");
    assert_eq!(ask(&path, &[json!({"do": "report"})])[0]["ok"], true);
    drop(server);
    fs::write(&path, "text").unwrap();
    let file = ApiServer::start(&vm, &path).unwrap_err().to_string();
    assert!(file.contains("no socket"), "{file}");
    assert_eq!(fs::read(&path).unwrap(), b"text");
    let long = directory.path().join("x".repeat(120));
    assert!(ApiServer::start(&vm, &long).unwrap_err().to_string().contains("107 bytes"));
}

#[test]
fn ending_the_vm_ends_whoever_waits_for_it() {
    let directory = scratch();
    let path = directory.path().join("vm.sock");
    let vm = vm();
    let server = ApiServer::start(&vm, &path).unwrap();
    let waits = std::thread::spawn({
        let path = path.clone();
        move || ask(&path, &[json!({"do": "run", "job": {"action": "count"}}), json!({"do": "wait"})])
    });
    while vm.report().job.is_none() {
        std::thread::yield_now();
    }
    vm.end();
    let answers = waits.join().unwrap();
    assert_eq!(answers[1]["kind"], "failed");
    drop(server);
}
