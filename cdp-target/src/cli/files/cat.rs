//! `files cat`: the content of files on stdout.

use super::Cat;
use super::session::Session;
use crate::cli::failure::Failure;
use crate::files::name::shown;
use crate::files::tree::{Piece, Tree};
use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

const BUFFER_BYTES: usize = 256 << 10;

pub(super) fn run(session: Session<'_>, arguments: &Cat) -> Result<ExitCode, Failure> {
    let opened = session.file_system()?;
    for path in &arguments.paths {
        print_file(&opened.tree, path).map_err(|failure| {
            if arguments.paths.len() > 1 { failure.context(shown(path.as_encoded_bytes())) } else { failure }
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_file(tree: &Tree, path: &OsString) -> Result<(), Failure> {
    let mut content = tree.find(path.as_encoded_bytes())?.content()?;
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut stdout = io::stdout().lock();
    loop {
        match content.next(&mut buffer)? {
            Piece::Bytes(len) => stdout.write_all(&buffer[..len])?,
            Piece::Hole(mut left) => {
                buffer.fill(0);
                while left > 0 {
                    let len = left.min(BUFFER_BYTES as u64);
                    stdout.write_all(&buffer[..len as usize])?;
                    left -= len;
                }
            }
            Piece::End => return Ok(stdout.flush()?),
        }
    }
}
