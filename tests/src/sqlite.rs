//! SQLite writers that remember what was committed when, and the check of what a recovery point kept of it.

use anyhow::{Context, Result, ensure};
use rusqlite::Connection;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

/// A commit that returned: the counter's value, and when it had returned, in milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug)]
pub struct Committed {
    /// The counter.
    pub counter: i64,
    /// When the commit had returned.
    pub at_ms: i64,
}

/// A thread that raises a counter, one transaction at a time, until it is stopped.
pub struct Writer {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Committed>>>,
}

/// Milliseconds since the Unix epoch.
#[must_use]
pub fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

impl Writer {
    /// Makes a database at `path` with `journal_mode` (`wal` or `delete`) and starts to write, with commits that last: with a
    /// rollback journal `synchronous=full` does not sync the folder after the journal was removed, and a power cut may bring
    /// the journal back and undo the last commit; `extra` does (sqlite.org/pragma.html).
    pub fn start(path: &Path, journal_mode: &'static str) -> Result<Self> {
        let connection = Connection::open(path)?;
        let mode: String =
            connection.query_row(&format!("pragma journal_mode={journal_mode}"), [], |row| row.get(0))?;
        ensure!(mode == journal_mode, "journal mode is {mode}");
        let synchronous = if journal_mode == "wal" { "full" } else { "extra" };
        connection.execute_batch(
            &format!("pragma synchronous={synchronous}; pragma wal_autocheckpoint=200;
             create table counter(value integer not null); insert into counter values(0);
             create table log(id integer primary key, payload blob not null); create index log_payload on log(payload);"),
        )?;
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let thread = std::thread::spawn(move || write(&connection, &asked));
        Ok(Self { path: path.to_owned(), stop, thread })
    }

    /// Stops; gives the database's file name and what was committed, in order.
    pub fn stop(self) -> Result<(String, Vec<Committed>)> {
        self.stop.store(true, Ordering::Relaxed);
        let committed = self.thread.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        ensure!(!committed.is_empty(), "the writer committed nothing");
        let name = self.path.file_name().context("a file name")?.to_string_lossy().into_owned();
        Ok((name, committed))
    }
}

fn write(connection: &Connection, stop: &AtomicBool) -> Result<Vec<Committed>> {
    let mut committed = Vec::new();
    let mut counter = 0_i64;
    while !stop.load(Ordering::Relaxed) {
        counter += 1;
        let payload = blake3::hash(&counter.to_le_bytes());
        connection.execute_batch("begin immediate")?;
        connection.execute("update counter set value = ?1", [counter])?;
        connection.execute("insert into log(id, payload) values(?1, ?2)", (counter, payload.as_bytes().as_slice()))?;
        // Old rows go, so that the database stays small and pages are freed and used again.
        connection.execute("delete from log where id <= ?1", [counter - 2_000])?;
        connection.execute_batch("commit")?;
        committed.push(Committed { counter, at_ms: now_ms() });
    }
    Ok(committed)
}

/// Opens the database in a restored folder, as an application would, checks it and gives its counter. `None` where the
/// database was not made yet.
pub fn counter_in(folder: &Path, name: &str) -> Result<Option<i64>> {
    let path = folder.join(name);
    if !path.exists() {
        return Ok(None);
    }
    let connection = Connection::open(&path)?;
    let integrity: String = connection.query_row("pragma integrity_check", [], |row| row.get(0))?;
    ensure!(integrity == "ok", "{name}: integrity_check: {integrity}");
    let tables: i64 =
        connection
            .query_row("select count(*) from sqlite_schema where name in ('counter', 'log')", [], |row| row.get(0))?;
    if tables < 2 {
        return Ok(None);
    }
    let value = connection.query_row("select value from counter", [], |row| row.get(0));
    let Some(value) = rusqlite::OptionalExtension::optional(value)? else { return Ok(None) };
    let newest: Option<i64> = connection.query_row("select max(id) from log", [], |row| row.get(0))?;
    ensure!(newest.unwrap_or(0) == value, "{name}: counter {value} and newest row {newest:?} are of one transaction");
    Ok(Some(value))
}
