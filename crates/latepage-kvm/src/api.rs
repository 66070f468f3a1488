//! What can be asked of a VM from outside: JSON, one line for a request and one for its answer.
//!
//! ```text
//! {"do": "discard", "first": 512, "count": 64}
//! {"ok": true, "result": null}
//! {"do": "jump"}
//! {"ok": false, "error": "unknown variant `jump`, expected one of …", "kind": "usage"}
//! ```

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::config::DiscardRange;
use crate::error::VmError;
use crate::job::Job;
use crate::vm::Vm;

/// A request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// Start a job: `job`. Result: none.
    Run {
        /// The job.
        job: Job,
    },
    /// Wait until no job runs, for `timeout` seconds at most (for ever if not given). Result: the last job's report, or none.
    Wait {
        /// Seconds.
        #[serde(default)]
        timeout: Option<f64>,
    },
    /// Take the vCPUs out of the guest. Result: none.
    Pause,
    /// Let them go on. Result: none.
    Resume,
    /// End the job as far as it is. Result: none.
    Stop,
    /// Save to `state_file` and `memory_file`. Result: a save report.
    Save {
        /// The state file.
        state_file: PathBuf,
        /// The memory file.
        memory_file: PathBuf,
    },
    /// Discard `first` and `count` pages, or `gpa` and `bytes`. Result: none.
    Discard {
        /// The pages.
        #[serde(flatten)]
        range: DiscardRange,
    },
    /// Have KVM keep the clock of `vcpu` at the guest-physical address `gpa`. Result: none.
    Clock {
        /// The vCPU's number.
        vcpu: usize,
        /// The address.
        gpa: u64,
    },
    /// Result: a report.
    Report,
    /// Compare every byte with what it should be. Result: a comparison.
    Compare,
    /// End the VM. Result: none.
    Quit,
}

/// An answer to a request.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The line, without its end.
    pub line: String,
    /// Whether the VM was asked to end: to be passed on ([`Vm::ask_to_quit`]) when the line is on its way.
    pub quits: bool,
}

/// Does what a line asks.
pub fn answer(vm: &Vm, line: &str) -> Answer {
    let (answer, quits) = match serde_json::from_str(line) {
        Err(error) => (json!({"ok": false, "error": error.to_string(), "kind": "usage"}), false),
        Ok(request) => {
            let quits = matches!(request, Request::Quit);
            let answer = match perform(vm, request) {
                Ok(result) => json!({"ok": true, "result": result}),
                Err(error) => json!({"ok": false, "error": error.to_string(), "kind": error.kind()}),
            };
            (answer, quits)
        }
    };
    Answer { line: answer.to_string(), quits }
}

fn perform(vm: &Vm, request: Request) -> Result<Value, VmError> {
    fn nothing(result: Result<(), VmError>) -> Result<Value, VmError> {
        result.map(|()| Value::Null)
    }
    match request {
        Request::Run { job } => nothing(vm.run(job)),
        Request::Wait { timeout } => {
            let timeout = match timeout.map(Duration::try_from_secs_f64) {
                None => None,
                Some(Ok(timeout)) => Some(timeout),
                Some(Err(error)) => return Err(VmError::Config(format!("timeout: {error}"))),
            };
            vm.wait(timeout).map(|report| json!(report))
        }
        Request::Pause => nothing(vm.pause()),
        Request::Resume => nothing(vm.resume()),
        Request::Stop => nothing(vm.stop()),
        Request::Save { state_file, memory_file } => {
            vm.save(&state_file, &memory_file).map(|report| json!(report))
        }
        Request::Discard { range } => nothing(vm.discard(range)),
        Request::Clock { vcpu, gpa } => nothing(vm.clock(vcpu, gpa)),
        Request::Report => Ok(json!(vm.report())),
        Request::Compare => vm.compare().map(|comparison| json!(comparison)),
        Request::Quit => Ok(Value::Null),
    }
}
