//! Points that are asked for, with hooks around them.
//!
//! One at a time: the pre-cut hook runs while points go on being made, then the next cut is the point's, then the application is let
//! go. Invariants: a point is of class `application` only if its cut was made between a pre-cut hook that ended with 0 and
//! the application's release, and within the hooks' deadline; the application is never held for longer than the deadline and a cut.

use super::{Group, Input, PointRequest, refuse};
use crate::hooks::{HookEvent, HookRun, HookSession};
use cdp_protocol::units::{Class, Epoch};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// A point that is made with hooks around it.
pub(super) struct Hooked {
    session: HookSession,
    /// Who asked; `None` once the point is made, or refused.
    request: Option<PointRequest>,
    /// Set once the pre-cut hook has ended.
    pre_cut: Option<PreCut>,
    is_over: bool,
}

/// What the pre-cut hook has come to.
struct PreCut {
    /// Why the application does not hold still.
    failure: Option<String>,
    /// Until when it may be held.
    until: Duration,
}

/// Whose point a capture is, and what it is worth.
pub(super) struct Taken {
    pub(super) request: Option<PointRequest>,
    pub(super) class: Class,
    pub(super) warning: Option<String>,
}

impl Group {
    /// Whether the next cut is of a point that was asked for.
    pub(super) fn is_point_due(&self) -> bool {
        match (&self.setup.hooks, &self.hooked) {
            (_, Some(hooked)) => hooked.request.is_some() && hooked.pre_cut.is_some(),
            (Some(_), None) => false,
            (None, None) => !self.wanted.is_empty(),
        }
    }

    /// Asks for a point with hooks where it is time for one, and nobody has asked for another.
    pub(super) fn want_in_time(&mut self, now: Duration) {
        let every_s = self.setup.hooks.as_ref().map_or(0, |hooks| hooks.every_s);
        let is_busy = self.restoring.is_some() || !self.wanted.is_empty() || self.hooked.is_some();
        if every_s == 0 || now < self.hooks_at || is_busy {
            return;
        }
        self.hooks_at = now + Duration::from_secs(every_s);
        // Nobody waits for the answer.
        let (reply, _) = oneshot::channel();
        self.wanted.push_back(PointRequest { label: None, wait: false, closes_image: false, reply });
    }

    /// Starts the hooks of the next point that is wanted, once it could be cut.
    pub(super) fn start_hooks(&mut self) {
        let is_ready = self.open.is_some() && self.devices.is_some() && self.restoring.is_none();
        let can_cut = is_ready && self.has_room() && !self.is_too_large();
        let Some(config) = self.setup.hooks.as_ref().filter(|_| can_cut && self.hooked.is_none()) else { return };
        let Some(request) = self.wanted.pop_front() else { return };
        let inputs = self.inputs.clone();
        let tell = move |event| {
            // Without a group nobody has to know.
            let _ = inputs.send(Input::Hook(event));
        };
        let clock = Arc::clone(&self.setup.clock);
        let started = HookSession::start(config.clone(), &self.setup.facts.name, request.label.as_deref(), clock, tell);
        match started {
            Ok(session) => {
                self.hooked = Some(Hooked { session, request: Some(request), pre_cut: None, is_over: false });
            }
            Err(error) => refuse(request, &format!("the hooks cannot be started: {error}")),
        }
    }

    pub(super) fn hook(&mut self, event: HookEvent) {
        let now = self.setup.clock.monotonic();
        match event {
            HookEvent::PreCut(run) => {
                self.count_hook("pre-cut", &run);
                // The cut has to come behind it.
                self.instant = None;
                let deadline_ms = self.setup.hooks.as_ref().map_or(0, |hooks| hooks.deadline_ms);
                if let Some(hooked) = &mut self.hooked {
                    let failure = run.failure.as_ref().map(|failure| format!("the pre-cut hook {failure}"));
                    hooked.pre_cut = Some(PreCut { failure, until: now + Duration::from_millis(deadline_ms) });
                    if hooked.request.is_none() {
                        hooked.session.release(None);
                    }
                }
                self.hooks.pre_cut = Some(run);
            }
            HookEvent::Over(run) => {
                if let Some(run) = &run {
                    self.count_hook("post-cut", run);
                }
                self.hooks.post_cut = run;
                if let Some(hooked) = &mut self.hooked {
                    hooked.is_over = true;
                }
                self.forget_hooked();
            }
        }
    }

    fn count_hook(&mut self, hook: &str, run: &HookRun) {
        let (group, output) = (&self.setup.facts.name, run.output.lines().last().unwrap_or_default());
        if let Some(failure) = &run.failure {
            self.hooks.failures += 1;
            tracing::warn!(group, hook, failure, output, "a hook failed");
        } else {
            tracing::info!(group, hook, duration_ms = run.duration_ms, output, "a hook has ended");
        }
    }

    /// Lets the application go where no cut has validated for so long; the point is made all the same.
    pub(super) fn let_go_in_time(&mut self) {
        let now = self.setup.clock.monotonic();
        let Some(hooked) = &mut self.hooked else { return };
        let Some(pre_cut) = hooked.pre_cut.as_mut().filter(|pre_cut| now >= pre_cut.until) else { return };
        if hooked.session.is_held() {
            hooked.session.release(None);
            pre_cut.failure.get_or_insert_with(|| "no cut was made while the application held still".into());
        }
    }

    /// A capture is made: whose point it is. The application is let go.
    pub(super) fn take_request(&mut self, epoch: Epoch, class: Class) -> Taken {
        let without = |request| Taken { request, class, warning: None };
        let now = self.setup.clock.monotonic();
        let Some(hooked) = &mut self.hooked else {
            let request = if self.setup.hooks.is_none() { self.wanted.pop_front() } else { None };
            return without(request);
        };
        let (Some(pre_cut), true) = (&hooked.pre_cut, hooked.request.is_some()) else { return without(None) };
        let failure = match &pre_cut.failure {
            None if now >= pre_cut.until => Some("the application was held for too long before the cut".to_owned()),
            failure => failure.clone(),
        };
        let taken = Taken {
            request: hooked.request.take(),
            class: if failure.is_none() { Class::Application } else { class },
            warning: failure,
        };
        hooked.session.release(Some(epoch));
        self.forget_hooked();
        taken
    }

    /// Nobody is answered with a point any more.
    pub(super) fn refuse_wanted(&mut self, reason: &str) {
        self.wanted.drain(..).for_each(|request| refuse(request, reason));
        let Some(hooked) = &mut self.hooked else { return };
        if let Some(request) = hooked.request.take() {
            refuse(request, reason);
        }
        if hooked.pre_cut.is_some() {
            hooked.session.release(None);
        }
        self.forget_hooked();
    }

    fn forget_hooked(&mut self) {
        self.hooked.take_if(|hooked| hooked.is_over && hooked.request.is_none());
    }
}
