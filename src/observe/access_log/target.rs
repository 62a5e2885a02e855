//! Where lines go.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::text::month;
use crate::config::access_log::SYSLOG;

/// Facility `local7`, severity `info` (RFC 5424, section 6.2.1): what nginx sends its access log as.
const PRIORITY: u8 = 23 * 8 + 6;
/// Of a message; every receiver takes 2 KiB, and most take 8 (section 6.1).
const LONGEST: usize = 8_192;

#[derive(Debug)]
pub(super) enum Target {
    Off,
    Stdout,
    File(File),
    Syslog(Syslog),
}

/// A system log.
#[derive(Debug)]
pub(super) struct Syslog {
    socket: Socket,
    host: String,
}

#[derive(Debug)]
enum Socket {
    Unix { path: PathBuf, socket: UnixDatagram },
    Udp(UdpSocket),
}

impl Target {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        match path.to_str() {
            Some("off") => Ok(Self::Off),
            Some("stdout") => Ok(Self::Stdout),
            Some(text) if text.starts_with(SYSLOG) => Syslog::open(text.trim_start_matches(SYSLOG)).map(Self::Syslog),
            _ => OpenOptions::new().create(true).append(true).open(path).map(Self::File),
        }
    }

    pub(super) fn write(&mut self, batch: &[u8]) -> Result<(), Lost> {
        let written = match self {
            Self::Off => Ok(()),
            Self::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(batch).and_then(|()| stdout.flush())
            }
            Self::File(file) => file.write_all(batch),
            Self::Syslog(syslog) => return syslog.write(batch),
        };
        written.map_err(|error| Lost { lines: batch.iter().filter(|b| **b == b'\n').count(), error })
    }
}

/// Lines that could not be written.
pub(super) struct Lost {
    pub(super) lines: usize,
    /// What the last of them met.
    pub(super) error: io::Error,
}

impl Syslog {
    fn open(place: &str) -> io::Result<Self> {
        let socket = match place.starts_with('/') {
            true => Socket::Unix { path: place.into(), socket: connected(Path::new(place))? },
            false => {
                let any = |address: &std::net::SocketAddr| if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let address = std::net::ToSocketAddrs::to_socket_addrs(place)?.next();
                let address = address.ok_or_else(|| io::Error::other("the host has no address"))?;
                let socket = UdpSocket::bind(any(&address))?;
                socket.connect(address)?;
                Socket::Udp(socket)
            }
        };
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Ok(Self { socket, host: if host.is_empty() { "-".to_owned() } else { host } })
    }

    /// Each line is a message; one that is lost stops no other.
    fn write(&mut self, batch: &[u8]) -> Result<(), Lost> {
        let mut lost: Option<Lost> = None;
        for line in batch.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            if let Err(error) = self.send(line) {
                let before = lost.map_or(0, |lost| lost.lines);
                lost = Some(Lost { lines: before + 1, error });
            }
        }
        lost.map_or(Ok(()), Err)
    }

    fn send(&mut self, line: &[u8]) -> io::Result<()> {
        let (now, process) = (SystemTime::now(), std::process::id());
        let head = match &self.socket {
            // What listens on this machine knows its name, and mostly no other form than this (RFC 3164, section 4.1).
            Socket::Unix { .. } => {
                let time = humantime::format_rfc3339_seconds(now).to_string();
                let part = |from, to| time.get(from..to).unwrap_or_default();
                let (month, day) = (month(&time), part(8, 10).trim_start_matches('0'));
                format!("<{PRIORITY}>{month} {day:>2} {} portolan[{process}]: ", part(11, 19))
            }
            // RFC 5424, section 6.
            Socket::Udp(_) => {
                let time = humantime::format_rfc3339_millis(now);
                format!("<{PRIORITY}>1 {time} {} portolan {process} access - ", self.host)
            }
        };
        let mut message = head.into_bytes();
        // Not in the middle of a character.
        let room = LONGEST.saturating_sub(message.len()).min(line.len());
        let end = (0..=room).rev().find(|end| line.get(*end).is_none_or(|byte| byte & 0xc0 != 0x80)).unwrap_or(room);
        message.extend_from_slice(line.get(..end).unwrap_or(line));
        match &mut self.socket {
            Socket::Udp(socket) => match socket.send(&message) {
                // The word that nobody listened to the message before.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => socket.send(&message).map(drop),
                other => other.map(drop),
            },
            Socket::Unix { path, socket } => match socket.send(&message) {
                // Whoever listened has been started anew.
                Err(_) => {
                    *socket = connected(path)?;
                    socket.send(&message).map(drop)
                }
                Ok(_) => Ok(()),
            },
        }
    }
}

fn connected(path: &Path) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.connect(path)?;
    Ok(socket)
}

/// A log's path as the configuration means it: only a file is relative to something.
pub fn resolve(path: &Path, beside: impl FnOnce(&Path) -> PathBuf) -> PathBuf {
    match path.to_str() {
        Some("off" | "stdout") => path.to_owned(),
        Some(text) if text.starts_with(SYSLOG) => path.to_owned(),
        _ => beside(path),
    }
}
