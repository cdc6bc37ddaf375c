//! The commands of `dsp`, one a file: its arguments, and what they lead to.

pub(crate) mod compare;
pub(crate) mod engine;
pub(crate) mod launch;
pub(crate) mod train;
pub(crate) mod verify;

use std::fmt::Arguments;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use anyhow::Context;

/// Prints a line, or returns from the function with the error.
macro_rules! say {
    () => { $crate::commands::line(format_args!(""))? };
    ($($text:tt)+) => { $crate::commands::line(format_args!($($text)+))? };
}
use say;

/// A line on the standard output. Whoever reads it may have read enough (`| head`), and what they asked for is done all
/// the same.
fn line(text: Arguments<'_>) -> anyhow::Result<()> {
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to the standard output"),
    }
}

/// Sees that a file can be written, before minutes are spent on what is to stand in it. What is there stays.
fn writable(path: &Path) -> anyhow::Result<()> {
    let new = !path.exists();
    let opened = OpenOptions::new().create(true).append(true).open(path);
    let tried = match new {
        true => opened.and_then(|_| fs::remove_file(path)),
        false => opened.map(drop),
    };
    tried.with_context(|| format!("cannot write {}", path.display()))
}

/// Writes a file whole.
fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// A path as a person can open it.
fn shown(path: &Path) -> String {
    std::path::absolute(path)
        .unwrap_or_else(|_| path.to_owned())
        .display()
        .to_string()
}
