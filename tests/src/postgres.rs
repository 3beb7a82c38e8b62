//! A PostgreSQL server of its own, on a folder of a volume: the programs Debian installs, as the user they insist on.
//!
//! The server ends when it is dropped, as at a power cut. Does not know what is protected.

use crate::process::{Daemon, as_user, run, tool};
use crate::site::PATIENCE;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The user that PostgreSQL's package makes.
pub const USER: &str = "postgres";

/// The folder of the newest version's programs; where none is installed, says on stderr that `test` is skipped.
#[must_use]
pub fn programs(test: &str) -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = versions.map(|version| version.path().join("bin")).filter(|bin| bin.join("postgres").exists()).max();
    let is_there = newest.is_some() || crate::has(test, "/usr/lib/postgresql/VERSION/bin/postgres");
    newest.filter(|_| is_there)
}

/// A server that runs.
pub struct Postgres {
    programs: PathBuf,
    sockets: PathBuf,
    server: Option<Daemon>,
}

impl Postgres {
    /// Makes an empty database in the folder `data`, which is made, with these lines of settings.
    pub fn init(programs: &Path, data: &Path, settings: &str) -> Result<()> {
        fs::create_dir_all(data)?;
        let text = data.to_str().context("a path of text")?;
        tool("chown", &[USER, text])?;
        let options = ["--no-instructions", "--data-checksums", "-A", "trust", "-D", text];
        run(&mut as_user(USER, &programs.join("initdb"), &options))?;
        fs::write(data.join("postgresql.auto.conf"), settings)?;
        Ok(())
    }

    /// Starts a server on `data`, reached by a socket in the folder `sockets`, which is made: a path of a hundred bytes at most,
    /// which the user can enter.
    pub fn start(programs: &Path, data: &Path, sockets: &Path) -> Result<Self> {
        fs::create_dir_all(sockets)?;
        tool("chown", &[USER, sockets.to_str().context("a path of text")?])?;
        let folder = format!("unix_socket_directories={}", sockets.display());
        let options = ["-D", data.to_str().context("a path of text")?, "-c", &folder, "-c", "listen_addresses="];
        let mut command = as_user(USER, &programs.join("postgres"), &options);
        let mut server = Daemon::start(command.env("LC_ALL", "C"))?;
        server.wait_for_line("ready to accept connections", PATIENCE)?;
        Ok(Self { programs: programs.to_owned(), sockets: sockets.to_owned(), server: Some(server) })
    }

    /// One of PostgreSQL's programs, which finds this server.
    #[must_use]
    pub fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = as_user(USER, &self.programs.join(program), arguments);
        command.env("PGHOST", &self.sockets).env("PGDATABASE", "postgres").env("LC_ALL", "C");
        command
    }

    /// Runs one of them to its end; gives its stdout.
    pub fn tool(&self, program: &str, arguments: &[&str]) -> Result<String> {
        run(&mut self.command(program, arguments))
    }

    /// Runs statements; gives what they answer, a line a row.
    pub fn sql(&self, text: &str) -> Result<String> {
        self.tool("psql", &["-X", "-q", "-A", "-t", "-c", text]).map(|answer| answer.trim().to_owned())
    }

    /// What the server has said so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.server.as_ref().map(Daemon::log).unwrap_or_default()
    }

    /// Ends it cleanly, once its clients have gone.
    pub fn stop(mut self) -> Result<()> {
        self.server.take().context("it runs")?.stop()
    }
}
