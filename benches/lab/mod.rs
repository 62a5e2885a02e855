//! What benches that load several programs side by side have in common: processes that end with them, nginx, wrk, and
//! the CPU time of each.

use std::collections::HashMap;
use std::fmt::Display;
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

pub const NGINX: &str = "/usr/sbin/nginx";
pub const WRK: &str = "/usr/bin/wrk";
/// For a start, an answer, or wrk's end beyond its duration: what takes longer has hung.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What one run of wrk saw.
pub struct Run {
    pub requests: f64,
    pub rate: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub wrk_cores: f64,
}

/// Starts nginx with this configuration.
pub fn start_nginx(dir: &Path, name: &'static str, template: &str, values: &[(&str, &dyn Display)]) -> Result<Process> {
    // Workers of root's nginx would become `nobody`, who cannot enter the temporary folder.
    let user = if fs::metadata("/proc/self")?.uid() == 0 { "user root;" } else { "" };
    let temp = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|kind| format!("{kind}_temp_path {kind};")).concat();
    let mut values = values.to_vec();
    values.push(("temp", &temp));
    let file = write(dir, &format!("{name}.conf"), template, &values)?;
    let global = format!("daemon off; {user} pid {name}.pid; error_log {name}.log; worker_rlimit_nofile 20000;");
    let mut command = Command::new(NGINX);
    command.arg("-c").arg(file).arg("-p").arg(dir).arg("-g").arg(global);
    Process::start(name, command, dir)
}

/// Loads `port` by a script that prints a line of totals. Any error, of a socket or of HTTP, ends the benchmark.
pub fn wrk(dir: &Path, script: &Path, port: u16, seconds: u64) -> Result<Run> {
    let mut command = Command::new(WRK);
    command.args(["-t1", "-c64", &format!("-d{seconds}s"), "-s"]).arg(script).arg(format!("http://127.0.0.1:{port}/"));
    let before = ticks("self", WAITED_FOR)?;
    let output = Process::start("wrk", command, dir)?.finish(Duration::from_secs(seconds) + PATIENCE)?;
    let wrk = (ticks("self", WAITED_FOR)? - before) as f64 / ticks_per_second()?;
    let line = output.lines().find_map(|l| l.strip_prefix("TOTALS ")).context("VOID: wrk told no totals")?;
    let totals: HashMap<&str, f64> = serde_json::from_str(line)?;
    let total = |name: &str| totals.get(name).copied().with_context(|| format!("wrk told no `{name}`"));
    for kind in ["connect", "read", "write", "timeout", "status"] {
        ensure!(total(kind)? == 0.0, "VOID: {} errors of kind `{kind}` at port {port}", total(kind)?);
    }
    let (requests, elapsed) = (total("requests")?, total("us")? / 1e6);
    ensure!(requests > 0.0 && elapsed > 0.0, "VOID: no requests at port {port}");
    let (p50_ms, p99_ms) = (total("p50")? / 1e3, total("p99")? / 1e3);
    Ok(Run { requests, rate: requests / elapsed, p50_ms, p99_ms, wrk_cores: wrk / elapsed })
}

/// How many ticks of CPU time a second has.
pub fn ticks_per_second() -> Result<f64> {
    let ticks = Command::new("getconf").arg("CLK_TCK").output().context("getconf cannot be run")?;
    Ok(String::from_utf8(ticks.stdout)?.trim().parse()?)
}

/// CPU time of a process and its children, in ticks.
pub fn used(pids: &[u32]) -> Result<u64> {
    pids.iter().map(|pid| ticks(pid, OWN)).sum::<Result<u64>>().context("VOID: a process is gone")
}

pub fn median<T>(samples: &[T], value: impl Fn(&T) -> f64) -> f64 {
    let mut values: Vec<_> = samples.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    let middle = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
    (middle((values.len().max(1) - 1) / 2) + middle(values.len() / 2)) / 2.0
}

/// A process of ours that ends with us.
pub struct Process {
    name: &'static str,
    pub child: Child,
    output: PathBuf,
}

impl Process {
    pub fn start(name: &'static str, mut command: Command, dir: &Path) -> Result<Self> {
        let output = dir.join(format!("{name}.output"));
        let file = File::create(&output)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("{name} cannot be started"))?;
        Ok(Self { name, child, output })
    }

    /// Returns once it listens on all of `ports`.
    pub fn listening(mut self, ports: &[u16]) -> Result<Self> {
        let until = Instant::now() + PATIENCE;
        while !ports.iter().all(|port| TcpStream::connect(("127.0.0.1", *port)).is_ok()) {
            let status = self.ended(Duration::from_millis(20));
            if status.is_some() || Instant::now() > until {
                bail!("{} does not listen ({status:?}):\n{}", self.name, fs::read_to_string(&self.output)?);
            }
        }
        Ok(self)
    }

    /// Its exit status, if it ends in time.
    fn ended(&mut self, within: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + within;
        loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < until => sleep(Duration::from_millis(20)),
                status => return status.ok().flatten(),
            }
        }
    }

    /// Waits for its end and returns what it printed.
    pub fn finish(&mut self, within: Duration) -> Result<String> {
        let status = self.ended(within).with_context(|| format!("VOID: {} does not end", self.name))?;
        let output = fs::read_to_string(&self.output)?;
        ensure!(status.success(), "VOID: {} ended with {status}:\n{output}", self.name);
        Ok(output)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that was waited for has given its id back: it may be somebody else's by now.
        if self.ended(Duration::ZERO).is_some() {
            return;
        }
        // The standard library only knows SIGKILL, and killing nginx's master would leave its workers behind:
        // ask first, by the shell's own `kill`. SIGINT is "at once" to all of ours.
        let signal = |name: &str, pids: Vec<u32>| {
            let pids = pids.iter().map(u32::to_string);
            Command::new("sh").args(["-c", "kill -s \"$0\" \"$@\"", name]).args(pids).stderr(Stdio::null()).status()
        };
        // Whether a signal arrived shows in whether the process ends.
        let pid = self.child.id();
        let _ = signal("INT", vec![pid]);
        if self.ended(Duration::from_secs(3)).is_none() {
            let _ = signal("KILL", family(pid).unwrap_or_else(|_| vec![pid]));
            let _ = self.ended(PATIENCE);
        }
    }
}

/// Positions in [`stat`]: the parent; user and system time of its own; the same of children waited for.
const PARENT: usize = 1;
const OWN: usize = 11;
const WAITED_FOR: usize = 13;

/// `/proc/PID/stat` from field 3 of proc(5) on; what is no number is 0.
fn stat(pid: impl Display) -> Result<Vec<u64>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Field 2, the name, may hold blanks and brackets.
    let (_, fields) = text.rsplit_once(')').context("/proc/*/stat cannot be understood")?;
    Ok(fields.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect())
}

fn ticks(pid: impl Display, which: usize) -> Result<u64> {
    Ok(stat(pid)?.iter().skip(which).take(2).sum())
}

/// A process and its children, sorted.
pub fn family(main: u32) -> Result<Vec<u32>> {
    let mut pids = vec![main];
    for entry in fs::read_dir("/proc")? {
        let pid = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        // One that ends while it is looked at is nobody's child.
        let is_child = |pid: &u32| stat(pid).is_ok_and(|s| s.get(PARENT) == Some(&u64::from(main)));
        pids.extend(pid.filter(is_child));
    }
    pids.sort_unstable();
    Ok(pids)
}

/// Writes a file in which `@name@` is replaced by the value of that name.
pub fn write(dir: &Path, name: &str, template: &str, values: &[(&str, &dyn Display)]) -> Result<PathBuf> {
    let fill = |text: String, (key, value): &(&str, &dyn Display)| text.replace(&format!("@{key}@"), &value.to_string());
    let file = dir.join(name);
    fs::write(&file, values.iter().fold(template.to_owned(), fill))?;
    Ok(file)
}

/// Ports that nobody has; all bound at once, so that they differ.
pub fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut ports = [0; N];
    for (port, listener) in ports.iter_mut().zip([(); N].map(|()| TcpListener::bind("127.0.0.1:0"))) {
        *port = listener?.local_addr()?.port();
    }
    Ok(ports)
}

pub fn setting(name: &str, default: u64) -> Result<u64> {
    let Ok(text) = std::env::var(name) else { return Ok(default) };
    let value = text.parse().ok().filter(|value| (1..=60).contains(value));
    value.with_context(|| format!("{name} must be a whole number from 1 to 60"))
}
