//! The API socket: a thread for each connection, requests and answers as lines ([`api`](crate::api)).

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle};

use crate::api;
use crate::error::VmError;
use crate::vm::Vm;

/// The longest path of a Unix socket (`sun_path`, with its closing zero).
const PATH_LIMIT: usize = 108;
/// The longest request: a list of pages, one by one, fits.
const LINE_LIMIT: u64 = 8 << 20;

/// A VM's API socket, served until it is dropped.
#[derive(Debug)]
pub struct ApiServer {
    path: PathBuf,
    listener: Arc<UnixListener>,
    /// Device and inode of the socket, to remove no other.
    identity: (u64, u64),
    connections: Arc<Mutex<Vec<UnixStream>>>,
    acceptor: Option<JoinHandle<()>>,
}

impl ApiServer {
    /// Listens on `path`, for this user alone. A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// [`VmError::ApiSocket`]: too long a path, a live socket, or a file that is no socket.
    pub fn start(vm: &Arc<Vm>, path: &Path) -> Result<Self, VmError> {
        let failed = |why: String| VmError::ApiSocket { path: path.to_path_buf(), why };
        if path.as_os_str().len() >= PATH_LIMIT {
            return Err(failed(format!("a socket's path has at most {} bytes", PATH_LIMIT - 1)));
        }
        make_way(path).map_err(failed)?;
        let listener = UnixListener::bind(path).map_err(|error| failed(error.to_string()))?;
        let made = fs::symlink_metadata(path).map_err(|error| failed(error.to_string()))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .map_err(|error| failed(error.to_string()))?;
        let mut server = Self {
            path: path.to_path_buf(),
            listener: Arc::new(listener),
            identity: (made.dev(), made.ino()),
            connections: Arc::default(),
            acceptor: None,
        };
        let (listener, connections, vm) =
            (Arc::clone(&server.listener), Arc::clone(&server.connections), Arc::downgrade(vm));
        let acceptor =
            thread::Builder::new().name("api".into()).spawn(move || accept(&listener, &connections, &vm));
        server.acceptor = Some(acceptor.map_err(|error| failed(error.to_string()))?);
        Ok(server)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        for connection in self.connections.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

/// Removes a socket that nobody listens on.
fn make_way(path: &Path) -> Result<(), String> {
    let Ok(there) = fs::symlink_metadata(path) else { return Ok(()) };
    if !there.file_type().is_socket() {
        return Err("a file is there that is no socket; choose another path".into());
    }
    match UnixStream::connect(path) {
        Ok(_) => Err("a VM listens there already; choose another path".into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)
            .map_err(|error| format!("the stale socket there cannot be removed: {error}")),
        Err(error) => Err(error.to_string()),
    }
}

fn accept(listener: &UnixListener, connections: &Arc<Mutex<Vec<UnixStream>>>, vm: &Weak<Vm>) {
    while let Ok((stream, _)) = listener.accept() {
        let Ok(kept) = stream.try_clone() else { continue };
        let identity = std::os::fd::AsRawFd::as_raw_fd(&kept);
        connections.lock().unwrap_or_else(PoisonError::into_inner).push(kept);
        let (vm, others) = (Weak::clone(vm), Arc::clone(connections));
        let talk = move || {
            converse(&stream, &vm);
            let mut others = others.lock().unwrap_or_else(PoisonError::into_inner);
            others.retain(|other| std::os::fd::AsRawFd::as_raw_fd(other) != identity);
        };
        // Where no thread is to be had the closure, and with it the connection, is dropped: the caller sees it close.
        let _ = thread::Builder::new().name("api-caller".into()).spawn(talk);
    }
}

fn converse(stream: &UnixStream, vm: &Weak<Vm>) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        match reader.by_ref().take(LINE_LIMIT).read_line(&mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let Some(vm) = vm.upgrade() else { return };
        let mut answer = api::answer(&vm, &line);
        answer.line.push('\n');
        let mut writer = stream;
        let sent = writer.write_all(answer.line.as_bytes());
        if answer.quits {
            vm.ask_to_quit();
        }
        if sent.is_err() || !line.ends_with('\n') {
            return;
        }
    }
}
