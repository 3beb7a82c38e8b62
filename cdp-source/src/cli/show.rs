//! Commands that show: `status`, `point`, `points`, `doctor`.

use super::failure::UserError;
use super::{PointArgs, PointsArgs};
use crate::agent::status::{
    AgentStatus, AuditStatus, ExcludeKind, ExcludeStatus, GroupStatus, HooksStatus, SpoolStatus, TargetDifference,
    rfc3339,
};
use crate::control::{self, ControlError, PointReply, Reply, Request};
use crate::doctor::{self, Finding, Grade};
use crate::hooks::HookRun;
use crate::restore::marker::Restoring;
use crate::state::StateFolder;
use crate::tracker::TrustReport;
use crate::unprotected::Unprotected;
use anyhow::{Result, bail};
use cdp_protocol::label::check_label;
use cdp_protocol::message::PointSummary;
use cdp_protocol::record::volume_meters::VolumeMeters;
use cdp_protocol::units::Class;
use serde_json::{Value, json};
use std::io::{self, Write};
use std::process::ExitCode;

/// Prints to stdout; a reader that went away is no error.
pub(super) fn print(text: &str) -> Result<()> {
    match writeln!(io::stdout(), "{}", text.trim_end()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

pub(super) fn print_json(value: &Value) -> Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}

/// Asks the agent; a refusal is the user's to handle.
pub(super) fn ask(state: &StateFolder, request: &Request) -> Result<Reply> {
    match control::ask(state, request)? {
        Reply::Failed { message, hint } => {
            let error = UserError::new(message);
            Err(if let Some(hint) = hint { error.hint(hint) } else { error }.into())
        }
        reply => Ok(reply),
    }
}

pub(super) fn status(state: &StateFolder, is_json: bool) -> Result<ExitCode> {
    match control::ask(state, &Request::Status) {
        Ok(Reply::Status(status)) if is_json => {
            let mut value = serde_json::to_value(&status)?;
            value["running"] = json!(true);
            print_json(&with_times(value))?;
        }
        Ok(Reply::Status(status)) => print(&status_text(&status))?,
        Ok(other) => bail!("the agent answered status with {other:?}"),
        Err(ControlError::NotRunning(_)) => return stopped(state, is_json),
        Err(error) => return Err(error.into()),
    }
    Ok(ExitCode::SUCCESS)
}

/// Without an agent: says so, and shows what is configured.
fn stopped(state: &StateFolder, is_json: bool) -> Result<ExitCode> {
    let config = state.config()?;
    let volumes = config.groups.iter().flat_map(|(group, config)| config.volumes.iter().map(move |v| (group, v)));
    if is_json {
        let volumes: Vec<Value> = volumes
            .map(|(group, v)| json!({ "group": group, "name": v.name, "slot": v.slot, "device": v.device }))
            .collect();
        print_json(&json!({ "running": false, "groups": [], "configured": volumes }))?;
    } else {
        let mut lines = vec!["no agent is running".to_owned()];
        lines.extend(volumes.map(|(group, v)| format!("configured: {group}/{} on {}", v.name, v.device.display())));
        lines.extend(config.groups.keys().filter_map(|group| {
            let restoring = Restoring::load(state, group).ok().flatten()?;
            Some(format!("{}; to go on: {}", restoring.describe(), restoring.command(group)))
        }));
        print(&lines.join("\n"))?;
        eprintln!("hint: start it: cdp-source run");
    }
    Ok(ExitCode::SUCCESS)
}

fn status_text(status: &AgentStatus) -> String {
    let line = match (status.connected_since, &status.last_error) {
        (Some(since), _) => format!("connected since {}", rfc3339(since)),
        (None, Some(error)) => format!("not connected: {error}"),
        (None, None) => "connecting".to_owned(),
    };
    let mut lines = vec![format!("agent: process {}, target {}, {line}", status.pid, status.target)];
    lines.extend(status.groups.iter().flat_map(group_lines));
    if status.groups.is_empty() {
        lines.push("no volume is protected".into());
    }
    lines.extend(status.unprotected.iter().map(unprotected_line));
    lines.join("\n")
}

/// Data that nobody copies.
fn unprotected_line(entry: &Unprotected) -> String {
    let (device, places) = (entry.device.display(), entry.mounted_on.join(", "));
    format!("not protected: {places}, {} on {device}; protect it, or name it in leave_unprotected", entry.file_system)
}

fn group_lines(group: &GroupStatus) -> Vec<String> {
    let number =
        |epoch: Option<cdp_protocol::units::Epoch>| epoch.map_or_else(|| "-".into(), |epoch| epoch.to_string());
    let percent = group.rescan_percent.map_or_else(String::new, |percent| format!(", {percent} % compared"));
    let reason = group.reason.as_ref().map_or_else(String::new, |reason| format!(" ({reason}{percent})"));
    let mut lines = vec![
        format!("group {}: {}{reason}", group.group, group.state.name()),
        format!(
            "  epochs: captured {}, sent {}, acked {}{}",
            number(group.captured_epoch),
            number(group.sent_epoch),
            number(group.acked_epoch),
            group.acked_time.map_or_else(String::new, |time| format!(" of {}", rfc3339(time))),
        ),
        format!(
            "  lag: {}{}; dirty: {} bytes; unacked: {} epochs, {} bytes",
            group.lag_ms.map_or_else(|| "unknown".into(), |ms| format!("{:.1} s", ms as f64 / 1000.0)),
            group.estimate_s.map_or_else(String::new, |s| format!(", caught up in about {s} s")),
            group.dirty_bytes,
            group.unacked_epochs,
            group.unacked_bytes,
        ),
    ];
    if let Some(cut) = group.last_cut {
        lines.push(format!(
            "  last cut: {}, {} blocks, {} rounds, {:.1} ms; failed since: {}",
            rfc3339(cut.time),
            cut.blocks,
            cut.rounds,
            cut.cut_us as f64 / 1000.0,
            group.failed_cuts
        ));
    }
    lines.extend(group.tracker.taken_up.as_ref().map(|record| format!("  tracking goes on from {record}")));
    lines.extend(spool_line(&group.spool));
    lines.extend(trust_line(&group.tracker.trust));
    lines.extend(audit_line(&group.audit));
    lines.extend(target_audit_line(&group.audit));
    lines.extend(group.hooks.iter().flat_map(hook_lines));
    lines.extend(freeze_line(group));
    lines.extend(group.local_image.iter().flat_map(super::image::status_lines));
    lines.extend(group.excludes.iter().map(exclude_line));
    for volume in &group.volumes {
        let (name, device) = (&volume.name, volume.device.display());
        lines.push(format!("  volume {name}: {device}, {} bytes, tracker {}", volume.size_bytes, group.tracker.kind));
        lines.extend(meters_line(&volume.meters));
    }
    lines
}

/// What became of a volume since the agent's start, once anything did.
fn meters_line(meters: &VolumeMeters) -> Option<String> {
    let share = |part: u64, all: u64| part.saturating_mul(100).checked_div(all).unwrap_or_default();
    let VolumeMeters { dirty_blocks, unchanged_blocks, content_blocks, hole_blocks, frame_bytes, .. } = *meters;
    let written = meters.written_bytes.map_or_else(String::new, |bytes| format!("{bytes} bytes written to its disk, "));
    (dirty_blocks > 0).then(|| {
        format!(
            "    {written}{dirty_blocks} blocks dirtied ({} % of them again), {unchanged_blocks} unchanged after all, {hole_blocks} holes, {content_blocks} sent ({} % did not pack), {frame_bytes} bytes of frames",
            share(meters.rewritten_blocks, dirty_blocks),
            share(meters.incompressible_blocks, content_blocks),
        )
    })
}

/// What is left out, or is not and why.
fn exclude_line(exclude: &ExcludeStatus) -> String {
    let kind = match exclude.kind {
        ExcludeKind::Configured => "",
        ExcludeKind::Swap => " (swap)",
        ExcludeKind::Own => " (digests)",
    };
    let path = exclude.path.display();
    match &exclude.reason {
        Some(reason) if exclude.bytes == 0 => format!("  not excluded: {path}: {reason}"),
        reason => {
            let but = reason.as_ref().map_or_else(String::new, |reason| format!("; {reason}"));
            format!("  excluded: {path}{kind}, {} bytes{but}", exclude.bytes)
        }
    }
}

/// What the audit has found, once it has looked at anything.
fn audit_line(audit: &AuditStatus) -> Option<String> {
    let AuditStatus { proved_blocks, learnt_blocks, differing_blocks, hurried_bytes, oldest_proof, .. } = *audit;
    let differing = match differing_blocks {
        0 => String::new(),
        blocks => format!("; {blocks} held something else, and were sent again: writes were missed"),
    };
    let since = oldest_proof.map_or_else(String::new, |time| format!("; every region since {}", rfc3339(time)));
    let hurried = match hurried_bytes {
        0 => String::new(),
        bytes => format!("; {bytes} bytes to go through within a day of the restart"),
    };
    (proved_blocks + learnt_blocks + differing_blocks + hurried_bytes > 0)
        .then(|| format!("  audit: {proved_blocks} blocks proved, {learnt_blocks} learnt{differing}{hurried}{since}"))
}

/// What the target was found to hold, once it was asked.
fn target_audit_line(audit: &AuditStatus) -> Option<String> {
    let AuditStatus { target_proved_blocks: proved, target_differing_blocks: differing, .. } = *audit;
    let difference = audit.target_difference.map_or_else(String::new, |difference| {
        let TargetDifference { time, slot, first_block, blocks } = difference;
        format!(
            "; {differing} are something else than was sent, and were sent again: the last {blocks} at {}, from block {first_block} of slot {slot} on",
            rfc3339(time)
        )
    });
    let since =
        audit.oldest_target_proof.map_or_else(String::new, |time| format!("; every region since {}", rfc3339(time)));
    (proved + differing > 0).then(|| format!("  audit of the target: {proved} blocks proved{difference}{since}"))
}

/// How each hook went when it ran last, if it has.
fn hook_lines(hooks: &HooksStatus) -> Vec<String> {
    let line = |(name, run): (&str, &Option<HookRun>)| {
        let HookRun { time, duration_ms, failure, output, .. } = run.as_ref()?;
        let result = failure.as_deref().unwrap_or("ended with status 0");
        let last = output.lines().last().unwrap_or_default();
        let last: String = last.chars().filter(|letter| !letter.is_control()).take(100).collect();
        let said = if last.is_empty() { last } else { format!(": {last}") };
        Some(format!("  {name} hook: {result} at {} after {duration_ms} ms{said}", rfc3339(*time)))
    };
    [("pre-cut", &hooks.pre_cut), ("post-cut", &hooks.post_cut)].into_iter().filter_map(line).collect()
}

/// What freezing has come to, where it was tried.
fn freeze_line(group: &GroupStatus) -> Option<String> {
    let failure = group.freeze_failure.as_ref().map_or_else(String::new, |reason| format!("; the last time: {reason}"));
    (group.freezes > 0 || !failure.is_empty())
        .then(|| format!("  file systems frozen for a cut: {} times{failure}", group.freezes))
}

/// What waits for the line, where anything does, was merged, or cannot be kept.
fn spool_line(spool: &SpoolStatus) -> Option<String> {
    let SpoolStatus { waiting_points, waiting_bytes, spooled_bytes, oldest_waiting_ms, merged_points, failure, .. } =
        spool;
    if *waiting_points == 0 && *merged_points == 0 && failure.is_none() {
        return None;
    }
    let oldest = oldest_waiting_ms.map_or_else(String::new, |ms| format!(", the oldest {} s old", ms / 1000));
    let failure =
        failure.as_ref().map_or_else(String::new, |failure| format!("; nothing is written to the disk: {failure}"));
    Some(format!(
        "  spool: {waiting_points} points wait{oldest}, {waiting_bytes} bytes, {spooled_bytes} of them on the disk; {merged_points} merged{failure}"
    ))
}

/// What there is to say of the tracking's counts, where they are not all as they should be.
fn trust_line(trust: &TrustReport) -> Option<String> {
    let counts = [
        (trust.completions_lost, "completions lost and made good"),
        (trust.blind_writes, "passthrough writes"),
        (trust.unremembered, "writes not kept in mind"),
        (trust.unknown, "writes of which nothing was known"),
        (trust.rescans, "rescans"),
    ];
    let mut told: Vec<String> =
        counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    told.extend(trust.rescanned.as_ref().map(|reason| format!("last rescan: {reason}")));
    (!told.is_empty()).then(|| format!("  tracking: {}", told.join("; ")))
}

/// Times in a status become RFC 3339.
fn with_times(mut value: Value) -> Value {
    fn replace(value: &mut Value) {
        if let Some(ms) = value.as_i64() {
            *value = json!(rfc3339(cdp_protocol::units::Timestamp(ms)));
        }
    }
    replace(&mut value["connected_since"]);
    for group in value["groups"].as_array_mut().into_iter().flatten() {
        replace(&mut group["acked_time"]);
        replace(&mut group["unchanged_as_of"]);
        for proof in ["oldest_proof", "oldest_target_proof"] {
            replace(&mut group["audit"][proof]);
        }
        if let Some(time) = group["audit"]["target_difference"].get_mut("time") {
            replace(time);
        }
        if let Some(cut) = group["last_cut"].as_object_mut()
            && let Some(time) = cut.get_mut("time")
        {
            replace(time);
        }
        for (part, field) in [("last", "time"), ("last", "made"), ("failure", "time")] {
            if let Some(time) = group["local_image"].get_mut(part).and_then(|part| part.get_mut(field)) {
                replace(time);
            }
        }
        for time in ["next", "since"] {
            if let Some(time) = group["local_image"].get_mut(time) {
                replace(time);
            }
        }
        for hook in ["pre_cut", "post_cut"] {
            if let Some(time) = group["hooks"][hook].get_mut("time") {
                replace(time);
            }
        }
    }
    value
}

pub(super) fn point(state: &StateFolder, args: &PointArgs) -> Result<ExitCode> {
    if let Some(label) = &args.label {
        check_label(label)
            .map_err(|error| UserError::new(error.to_string()).hint("give a word, such as before-upgrade"))?;
    }
    let timeout_ms = (!args.timeout.is_zero()).then_some(args.timeout.as_millis() as u64);
    let request = Request::Point { group: args.group.clone(), label: args.label.clone(), wait: args.wait, timeout_ms };
    let Reply::Point(point) = ask(state, &request)? else { bail!("the agent did not answer with a point") };
    if args.json {
        print_json(&point_json(&point))?;
    } else {
        print(&point_text(&point))?;
        if let Some(warning) = &point.warning {
            eprintln!("warning: {warning}: the point is of class {}", class_name(point.class));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn point_json(point: &PointReply) -> Value {
    json!({
        "epoch": point.epoch,
        "time": rfc3339(point.time),
        "class": point.class,
        "label": point.label,
        "acked": point.acked,
        "warning": point.warning,
    })
}

fn point_text(point: &PointReply) -> String {
    let label = point.label.as_ref().map_or_else(String::new, |label| format!(" {label:?}"));
    let state = if point.acked { "committed at the target" } else { "captured, on its way" };
    let class =
        if point.class == Class::Crash { String::new() } else { format!(", class {}", class_name(point.class)) };
    format!("point {}{label} of {}{class}: {state}", point.epoch, rfc3339(point.time))
}

pub(super) fn points(state: &StateFolder, args: &PointsArgs) -> Result<ExitCode> {
    let points = match ask(state, &Request::Points { group: args.group.clone() }) {
        Ok(Reply::Points { points }) => points,
        Ok(_) => bail!("the agent did not answer with points"),
        // Who restores a machine may have no agent to ask.
        Err(error) if matches!(error.downcast_ref(), Some(ControlError::NotRunning(_))) => {
            super::restore::points(state, &args.group)?
        }
        Err(error) => return Err(error),
    };
    if args.json {
        print_json(&json!({ "group": args.group, "points": points.iter().map(summary_json).collect::<Vec<_>>() }))?;
    } else if points.is_empty() {
        print("the target holds no points of this group yet")?;
    } else {
        let mut lines = vec![format!("{:>10}  {:24}  {:11}  {:>12}  label", "epoch", "time", "class", "bytes")];
        lines.extend(points.iter().map(|p| {
            let (time, label) = (rfc3339(p.cut_time), p.label.as_deref().unwrap_or(""));
            format!("{:>10}  {time:24}  {:11}  {:>12}  {label}", p.epoch.0, class_name(p.class), p.bytes)
                .trim_end()
                .to_owned()
        }));
        print(&lines.join("\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn class_name(class: Class) -> String {
    serde_json::to_value(class).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn summary_json(point: &PointSummary) -> Value {
    json!({
        "epoch": point.epoch,
        "time": rfc3339(point.cut_time),
        "class": point.class,
        "label": point.label,
        "bytes": point.bytes,
        "cut_ms": point.cut_us as f64 / 1000.0,
        "cut_rounds": point.cut_rounds,
    })
}

pub(super) fn doctor(state: &StateFolder, is_json: bool) -> Result<ExitCode> {
    let mut findings = doctor::examine(state);
    findings.extend(super::run::line_findings(state));
    let worst = findings.iter().map(|finding| finding.grade).max().unwrap_or(Grade::Ok);
    if is_json {
        print_json(&json!({ "worst": worst, "findings": findings }))?;
    } else {
        print(&findings.iter().map(finding_text).collect::<Vec<_>>().join("\n"))?;
    }
    Ok(ExitCode::from(u8::from(worst == Grade::Fail)))
}

fn finding_text(finding: &Finding) -> String {
    let grade = match finding.grade {
        Grade::Ok => "ok  ",
        Grade::Warn => "warn",
        Grade::Fail => "fail",
    };
    let advice = finding.advice.as_ref().map_or_else(String::new, |advice| format!("\n      → {advice}"));
    format!("{grade}  {}: {}{advice}", finding.subject, finding.found)
}
