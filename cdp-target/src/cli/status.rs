//! `status`: offices and groups.

use super::arguments::DataFolder;
use super::failure::Failure;
use super::output::{Table, bytes, duration_ms, json};
use super::{context, print};
use crate::catalog::Catalog;
use crate::control::Request;
use crate::status::{DrillStatus, GroupState, GroupStatus, StatusReport, report};
use std::process::ExitCode;

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// One JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    data: DataFolder,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let store = context::open(&arguments.data)?;
    let report = match context::ask_server(&store, &Request::Status)? {
        Some(value) => serde_json::from_value(value)?,
        None => report(&store, &Catalog::new(&store, context::authority(&store)?), None, context::now())?,
    };
    print(&if arguments.json { json(&report) } else { text(&report) })?;
    Ok(ExitCode::SUCCESS)
}

fn text(report: &StatusReport) -> String {
    let serving = report.listening.as_ref().map_or("no server runs".to_owned(), |at| format!("serving on {at}"));
    let mut text = format!("store {}: {serving}, {} free\n", report.store, bytes(report.free_bytes));
    if report.offices.is_empty() {
        text.push_str("no office is enrolled yet: `cdp-target enroll OFFICE --output FILE`\n");
        return text;
    }
    let columns =
        ["office", "group", "state", ">live rpo", ">lag", ">points", "newest", ">used", "quota", "last drill"];
    let mut table = Table::new(&columns);
    for office in &report.offices {
        for group in &office.groups {
            let ms = |ms: Option<i64>| ms.map_or_else(|| "-".to_owned(), duration_ms);
            table.row(vec![
                office.name.clone(),
                group.name.clone(),
                state_name(group.state).to_owned(),
                ms(group.live_rpo_ms),
                ms(group.lag_ms),
                group.points.to_string(),
                group
                    .newest
                    .as_ref()
                    .map_or_else(|| "-".to_owned(), |newest| format!("{} {}", newest.epoch, newest.time)),
                bytes(group.used_bytes),
                "-".to_owned(),
                drill_cell(group),
            ]);
            if let Some(DrillStatus { epoch, failure: Some(failure), .. }) = &group.last_drill {
                table.note(format!("  {}/{}: drill of point {epoch}: {failure}", office.name, group.name));
            }
            if let Some(reason) = &group.reason {
                table.note(format!("  {}/{}: {reason}", office.name, group.name));
            }
            for history in &group.histories {
                let whose =
                    history.host.as_ref().map_or_else(|| "this store's".to_owned(), |host| format!("of {host}"));
                table.note(format!("    a history ends at {}: {whose}", history.head));
            }
            if !group.histories.is_empty() {
                let group = format!("{}/{}", office.name, group.name);
                table.note(format!("  hint: cdp-target resolve {group} --continue-from HEAD says which goes on"));
            }
        }
        if office.groups.is_empty() {
            table.note(format!("{}  ({}, no group yet)", office.name, office.state));
        }
    }
    text.push_str(&table.render());
    text
}

/// How the last drill came out, and how long ago; whether the next should have been.
fn drill_cell(group: &GroupStatus) -> String {
    let last = group.last_drill.as_ref().map(|drill| {
        let result = if drill.passed { "passed" } else { "FAILED" };
        format!("{result} {} ago", duration_ms(drill.age_ms))
    });
    match (last, group.drill_overdue) {
        (None, false) => "-".to_owned(),
        (None, true) => "OVERDUE, never".to_owned(),
        (Some(last), false) => last,
        (Some(last), true) => format!("OVERDUE, {last}"),
    }
}

const fn state_name(state: GroupState) -> &'static str {
    match state {
        GroupState::Connected => "connected",
        GroupState::Disconnected => "disconnected",
        GroupState::NotServed => "not served",
        GroupState::Frozen => "FROZEN",
        GroupState::Refused => "REFUSED",
        GroupState::Failed => "FAILED",
    }
}
