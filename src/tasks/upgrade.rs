//! Hands sockets from one process to the next, over a Unix socket: the new one waits there, the old one comes when it is
//! told to (SIGQUIT). Until the new one says that it serves, the old one goes on.

use std::collections::HashMap;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    sockopt,
};

/// How long the new process waits for the old one.
const WAIT: Duration = Duration::from_secs(60);
/// How long the old one looks for the new one.
const LOOK: Duration = Duration::from_secs(10);
/// How long the sockets may take, once the old process is there: it writes down what only one process may have.
const BEGIN: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(50);

/// Sockets that are handed over at most.
const SOCKETS: usize = 64;
/// Bytes of all addresses together.
const ADDRESSES: usize = 8 << 10;
/// What the new process says once it serves.
const SERVING: u8 = b'1';

/// What came from the old process.
#[derive(Debug)]
pub struct Taken {
    /// By the address that its configuration had.
    sockets: HashMap<String, OwnedFd>,
    old: UnixStream,
}

impl Taken {
    /// The socket of this address, if the old process listened there.
    pub fn socket(&mut self, address: &str) -> Option<std::net::TcpListener> {
        self.sockets.remove(address).map(Into::into)
    }

    /// Tells the old process that it may go, and closes what nobody took.
    pub fn serving(mut self) -> io::Result<()> {
        self.old.write_all(&[SERVING])
    }
}

/// Waits at `path` for the old process. Blocks.
pub fn take(path: &Path) -> io::Result<Taken> {
    match fs::symlink_metadata(path) {
        // Of a process that ended while it waited.
        Ok(meta) if meta.file_type().is_socket() => fs::remove_file(path)?,
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    let until = Instant::now() + WAIT;
    let old = loop {
        match listener.accept() {
            Ok((old, _)) => match is_ours(&old) {
                Ok(()) => break old,
                Err(error) => tracing::warn!(%error, "somebody else came to the upgrade socket"),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => std::thread::sleep(PAUSE),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the running process did not come: send it SIGQUIT"));
            }
            Err(error) => return Err(error),
        }
    };
    // It may be gone; then there is nothing to remove.
    let _ = fs::remove_file(path);
    old.set_nonblocking(false)?;
    old.set_read_timeout(Some(BEGIN))?;
    let mut text = vec![0; ADDRESSES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(&old, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let sockets = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(sockets) => sockets.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    let sockets: Vec<OwnedFd> = sockets.collect();
    let addresses: Vec<String> = serde_json::from_slice(text.get(..received.bytes).unwrap_or_default())?;
    if addresses.len() != sockets.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "there are not as many sockets as addresses"));
    }
    Ok(Taken { sockets: addresses.into_iter().zip(sockets).collect(), old })
}

/// Gives these sockets to the process that waits at `path`; returns once that serves. `let_go` is called when it is there, before
/// it gets anything. Blocks.
pub fn give(path: &Path, sockets: &[(String, BorrowedFd<'_>)], let_go: impl FnOnce()) -> io::Result<()> {
    let until = Instant::now() + LOOK;
    let mut new = loop {
        match UnixStream::connect(path) {
            Ok(new) => break new,
            Err(_) if Instant::now() < until => std::thread::sleep(PAUSE),
            Err(error) => return Err(error),
        }
    };
    is_ours(&new)?;
    let_go();
    let (addresses, descriptors): (Vec<&String>, Vec<BorrowedFd<'_>>) =
        sockets.iter().map(|(address, fd)| (address, *fd)).unzip();
    let text = serde_json::to_vec(&addresses)?;
    if descriptors.len() > SOCKETS || text.len() > ADDRESSES {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "there are too many listeners"));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    let sent = sendmsg(&new, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL)?;
    new.write_all(text.get(sent..).unwrap_or_default())?;
    // However long it takes to begin: should it end, so does this.
    let mut answer = [0];
    match new.read_exact(&mut answer) {
        Ok(()) if answer == [SERVING] => Ok(()),
        Ok(()) => Err(io::Error::new(io::ErrorKind::InvalidData, "it says something else")),
        Err(error) => Err(io::Error::new(error.kind(), "it ended before it served")),
    }
}

/// Is the other end of our own user, or the system's?
fn is_ours(other: &impl AsFd) -> io::Result<()> {
    let theirs = sockopt::socket_peercred(other)?.uid;
    if theirs == rustix::process::geteuid() || theirs.is_root() {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "it is another user's process"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn from_hand_to_hand() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("upgrade");
        // Left behind by somebody.
        drop(UnixListener::bind(&path).unwrap());
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let waits = {
            let path = path.clone();
            std::thread::spawn(move || take(&path))
        };
        let gives = std::thread::spawn(move || {
            give(&path, &[("a:1".to_owned(), listener.as_fd()), ("b:2".to_owned(), listener.as_fd())], || {})
        });
        let mut taken = waits.join().unwrap().unwrap();
        let own = taken.socket("a:1").unwrap();
        assert_eq!(own.local_addr().unwrap(), address);
        assert!(taken.socket("c:3").is_none());
        taken.serving().unwrap();
        gives.join().unwrap().unwrap();
        let _client = std::net::TcpStream::connect(address).unwrap();
        own.accept().unwrap();
    }

    #[test]
    fn who_fails_to_begin_is_given_nothing() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("upgrade");
        let waits = {
            let path = path.clone();
            std::thread::spawn(move || take(&path).map(drop))
        };
        assert!(give(&path, &[], || {}).unwrap_err().to_string().contains("before it served"));
        waits.join().unwrap().unwrap();
        std::fs::write(&path, "mine").unwrap();
        assert!(take(&path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"mine", "nobody's file is removed");
    }
}
