//! How results are printed: tables for people, one JSON document for programs.

pub(super) use crate::forecast::bytes;
use std::fmt::Write as _;

/// Columns that line up, two spaces apart. Numbers to the right.
pub(super) struct Table {
    header: Vec<&'static str>,
    right: Vec<bool>,
    rows: Vec<Row>,
}

enum Row {
    Cells(Vec<String>),
    Note(String),
}

impl Table {
    /// A table with these columns; those whose name begins with `>` are set to the right.
    #[must_use]
    pub(super) fn new(columns: &[&'static str]) -> Self {
        Self {
            header: columns.iter().map(|name| name.trim_start_matches('>')).collect(),
            right: columns.iter().map(|name| name.starts_with('>')).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row, a cell a column.
    pub(super) fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.header.len(), "a cell a column");
        self.rows.push(Row::Cells(cells));
    }

    /// Adds a line of its own.
    pub(super) fn note(&mut self, note: String) {
        self.rows.push(Row::Note(note));
    }

    /// The text, a line a row.
    #[must_use]
    pub(super) fn render(&self) -> String {
        let mut widths: Vec<usize> = self.header.iter().map(|name| name.len()).collect();
        for row in &self.rows {
            if let Row::Cells(cells) = row {
                for (width, cell) in widths.iter_mut().zip(cells) {
                    *width = (*width).max(cell.chars().count());
                }
            }
        }
        let header: Vec<String> = self.header.iter().map(|name| name.to_uppercase()).collect();
        let mut text = self.line(&header, &widths);
        for row in &self.rows {
            match row {
                Row::Cells(cells) => text.push_str(&self.line(cells, &widths)),
                Row::Note(note) => {
                    text.push_str(note);
                    text.push('\n');
                }
            }
        }
        text
    }

    fn line(&self, cells: &[String], widths: &[usize]) -> String {
        let mut line = String::new();
        for ((cell, width), right) in cells.iter().zip(widths).zip(&self.right) {
            let set = if *right { write!(line, "{cell:>width$}  ") } else { write!(line, "{cell:<width$}  ") };
            set.expect("text takes anything");
        }
        let mut line = line.trim_end().to_owned();
        line.push('\n');
        line
    }
}

/// A length of time for a person: its two largest units.
#[must_use]
pub(super) fn duration_ms(ms: i64) -> String {
    if ms < 0 {
        return format!("-{}", duration_ms(ms.saturating_neg()));
    }
    let seconds = ms / 1000;
    match seconds {
        0..10 => format!("{seconds}.{} s", ms % 1000 / 100),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86400, seconds % 86400 / 3600),
    }
}

/// A JSON document with a line feed.
#[must_use]
pub(super) fn json<T: serde::Serialize>(value: &T) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("our documents have text keys");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&[">epoch", "label"]);
        table.row(vec!["7".into(), "x".into()]);
        table.note("-- gap --".into());
        table.row(vec!["1234567".into(), String::new()]);
        assert_eq!(table.render(), "  EPOCH  LABEL\n      7  x\n-- gap --\n1234567\n");
    }

    #[test]
    fn sizes_and_times_are_short() {
        for (size, expected) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1 << 30, "1.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(size), expected);
        }
        for (ms, expected) in [
            (0, "0.0 s"),
            (1250, "1.2 s"),
            (59_999, "59 s"),
            (61_000, "1 min 1 s"),
            (7_260_000, "2 h 1 min"),
            (-90_061_000, "-1 d 1 h"),
        ] {
            assert_eq!(duration_ms(ms), expected);
        }
    }
}
