//! How commands talk to a running process: a small HTTP/1.1 client for the admin address.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use super::UserError;

/// Which process to talk to.
#[derive(Debug, Args)]
pub struct AdminArgs {
    /// The admin address of the running process
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:9901")]
    admin: url::Url,
    /// The admin token
    #[arg(long, env = "PORTOLAN_ADMIN_TOKEN", hide_env_values = true, hide = true)]
    token: Option<String>,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: String,
}

impl AdminArgs {
    /// Sends a request without a body.
    pub fn request(&self, method: &str, path: &str) -> anyhow::Result<Answer> {
        self.send(method, path, "")
    }

    /// Sends one request.
    pub fn send(&self, method: &str, path: &str, body: &str) -> anyhow::Result<Answer> {
        let mut stream = self.open(method, path, body)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("the answer is no HTTP")?;
        Ok(Answer { status: status(head)?, body: body.to_owned() })
    }

    /// Hands every event (name and data) of a stream of them to `hear`, until that has enough or the stream ends.
    pub fn events(&self, path: &str, mut hear: impl FnMut(&str, &str) -> bool) -> anyhow::Result<()> {
        let mut lines = BufReader::new(self.open("GET", path, "")?).lines();
        let head = lines.next().context("the answer is no HTTP")??;
        let code = status(&head)?;
        if code != 200 {
            return Err(UserError(format!("{path} answered {code}")).into());
        }
        let mut name = String::new();
        for line in lines {
            let line = line?;
            match line.split_once(':').map(|(field, value)| (field, value.trim_start())) {
                Some(("event", value)) => name = value.to_owned(),
                Some(("data", value)) if !hear(&name, value) => return Ok(()),
                _ => {}
            }
        }
        Ok(())
    }

    /// Sends a request. The admin side is on this machine or behind a tunnel: plain HTTP only.
    fn open(&self, method: &str, path: &str, body: &str) -> anyhow::Result<TcpStream> {
        if self.admin.scheme() != "http" {
            return Err(UserError("--admin takes an http:// URL".to_owned()).into());
        }
        let address = self.admin.socket_addrs(|| Some(9901)).with_context(|| format!("{} cannot be resolved", self.admin))?;
        let mut stream = TcpStream::connect(address.as_slice())
            .with_context(|| format!("no process answers at {} (is Portolan running?)", self.admin))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let host = address.first().map(ToString::to_string).unwrap_or_default();
        let authorization = self.token.as_ref().map(|t| format!("Authorization: Bearer {t}\r\n")).unwrap_or_default();
        // HTTP/1.0: the answer ends where the connection does.
        let length = body.len();
        write!(stream, "{method} {path} HTTP/1.0\r\nHost: {host}\r\n{authorization}Content-Length: {length}\r\n\r\n{body}")?;
        Ok(stream)
    }
}

fn status(head: &str) -> anyhow::Result<u16> {
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).context("the answer is no HTTP")?;
    if status == 401 {
        return Err(UserError("the admin token is needed, or this is not it: set PORTOLAN_ADMIN_TOKEN".to_owned()).into());
    }
    Ok(status)
}
