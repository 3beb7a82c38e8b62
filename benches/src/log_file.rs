//! A log as an office's server keeps it: lines of a date, a program, and something that is different each time.

use anyhow::Result;
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// Lines that it has from the start: it has been written for a while.
const LINES: u64 = 500;

pub(crate) struct LogFile {
    file: File,
    number: u64,
    synced: bool,
}

impl LogFile {
    /// A new one; whether each line is synced at once, or left to the system.
    pub(crate) fn new(path: &Path, synced: bool) -> Result<Self> {
        let file = File::options().create_new(true).append(true).open(path)?;
        let mut log = Self { file, number: 0, synced };
        for _ in 0..LINES {
            log.line()?;
        }
        log.file.sync_all()?;
        Ok(log)
    }

    pub(crate) fn line(&mut self) -> Result<()> {
        self.number += 1;
        let mut token = [0; 8];
        cdp_tests::files::noise(self.number, &mut token);
        let token = u64::from_le_bytes(token);
        let (minute, second, ms) = (self.number / 60 % 60, self.number % 60, token % 1000);
        writeln!(
            self.file,
            "2026-11-27T09:{minute:02}:{second:02}.{ms:03} office sshd[{}]: session {token:016x} of user{} opened",
            1000 + token % 30_000,
            token % 17
        )?;
        if self.synced {
            self.file.sync_data()?;
        }
        Ok(())
    }
}
