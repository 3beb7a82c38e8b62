//! Where commands are answered and the server's own work is started, beside what the lines bring.

use super::{CHANGE_TIMEOUT, CLOSE_TIMEOUT, METRICS_INTERVAL};
use crate::authority::{Authority, AuthorityError};
use crate::catalog::{Catalog, CatalogError, Group, open_group};
use crate::cli::failure_reply;
use crate::control::{Handler, Reply, ReplyFuture, Request};
use crate::drill::schedule::Schedule;
use crate::enroll::{Admitted, Invite};
use crate::errand::errand;
use crate::groups::StoreGroups;
use crate::heal::{Healer, OpenGroup, Tools};
use crate::journal::file::FileId;
use crate::journal::{Damage, JournalError, short_claim};
use crate::listener::{Listener, Serve};
use crate::maintenance::Maintenance;
use crate::metrics;
use crate::receiver::{GroupWriter, Receiver, StoreError};
use crate::restore::image::one_line;
use crate::restore::keyring::Keyring;
use crate::scrub::Scrub;
use crate::status::{KnownGroups, Live, LiveGroup, StatusReport, Watermarks, report};
use crate::store::{GroupPlace, Store};
use anyhow::Context as _;
use cdp_protocol::join::KnownGroup;
use cdp_protocol::units::{Epoch, GroupId, OfficeId, Timestamp};
use cdp_seams::clock::Clock;
use cdp_seams::line::{BoxFuture, Line};
use cdp_seams::random::SystemRandom;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// Where commands are answered.
pub(super) struct Desk {
    pub(super) store: Store,
    pub(super) authority: Arc<Mutex<Authority>>,
    pub(super) groups: Arc<StoreGroups>,
    pub(super) receiver: Arc<Receiver>,
    pub(super) listener: Listener,
    pub(super) address: SocketAddr,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) known: KnownGroups,
}

impl Live for Desk {
    fn known(&self) -> &KnownGroups {
        &self.known
    }

    fn listening(&self) -> String {
        self.address.to_string()
    }

    fn group(&self, office: &str, place: GroupPlace) -> LiveGroup {
        let mut known = self.receiver.live().into_iter();
        let found = known.find(|(of, group, _)| of == office && *group == place.group);
        let live = found.map(|(.., live)| live).unwrap_or_default();
        LiveGroup {
            connected: live.connected_since.is_some(),
            // By our clock at most: a source that runs ahead is not fresher for it.
            unchanged: live.unchanged.map(|word| (word.epoch, word.as_of.min(word.received_at))),
            watermarks: Watermarks {
                received: live.received.map(|(epoch, _)| epoch),
                journaled: live.journaled,
                acked: live.acked,
            },
            trouble: live.trouble,
            view: self.groups.view(place),
        }
    }
}

impl Serve for Desk {
    fn groups(&self, office: OfficeId) -> Vec<KnownGroup> {
        self.groups.known(office)
    }

    fn serve(&self, office: Admitted, line: Box<dyn Line>) -> BoxFuture<'static, ()> {
        self.groups.admit(&office.name, office.office);
        let receiver = Arc::clone(&self.receiver);
        Box::pin(async move {
            tracing::info!(office = office.name, "connected");
            match receiver.serve_connection(line, &office.name).await {
                Ok(()) => tracing::info!(office = office.name, "disconnected"),
                Err(error) => tracing::info!(office = office.name, reason = one_line(&error), "disconnected"),
            }
        })
    }
}

impl Handler for Desk {
    fn handle(self: Arc<Self>, request: Request) -> ReplyFuture {
        Box::pin(async move {
            let done = tokio::task::spawn_blocking(move || self.answer(request)).await;
            match done {
                Ok(Ok(value)) => Reply::Done(value),
                Ok(Err(error)) => failure_reply(error),
                Err(panic) => failure_reply(anyhow::Error::from(panic).context("answer a command")),
            }
        })
    }
}

impl Desk {
    fn answer(&self, request: Request) -> anyhow::Result<serde_json::Value> {
        match request {
            Request::Status => Ok(serde_json::to_value(self.report()?)?),
            Request::Enroll { office, valid_for_ms, replace } => {
                let valid_for = Duration::from_millis(valid_for_ms);
                let targets = self.store.config().targets(self.address.port());
                let invite = Invite { office: &office, targets: &targets, valid_for, replace };
                let bundle = self.authority.lock().unwrap_or_else(PoisonError::into_inner).invite(&invite)?;
                tracing::info!(office, replace, "office invited");
                Ok(bundle.to_text().into())
            }
            Request::Label { office, group, epoch, label } => {
                let place = self.catalog()?.group(&office, &group)?.place();
                self.on_thread(&office, place, move |writer| writer.label(Epoch(epoch), Some(&label)))?;
                Ok(serde_json::Value::Null)
            }
            Request::Pin { office, group, epoch, pinned } => {
                let place = self.catalog()?.group(&office, &group)?.place();
                self.on_thread(&office, place, move |writer| writer.pin(Epoch(epoch), pinned))?;
                Ok(serde_json::Value::Null)
            }
            Request::Adopt { office, group, change } => {
                let place = self.catalog()?.group(&office, &group)?.place();
                self.on_thread(&office, place, move |writer| writer.adopt(&change))?;
                Ok(serde_json::Value::Null)
            }
            Request::Leased { office, group } => {
                let place = self.catalog()?.group(&office, &group)?.place();
                let oldest = self.on_thread(&office, place, |writer| Ok(writer.oldest_lease()))?;
                Ok(oldest.is_some().into())
            }
            Request::Resolve { office, group, continue_from } => {
                let place = self.catalog()?.group(&office, &group)?.place();
                let head = short_claim(self.on_thread(&office, place, move |writer| writer.resolve(&continue_from))?);
                tracing::warn!(office, group, head, "fork resolved by an operator");
                Ok(head.into())
            }
        }
    }

    /// Opens, one after the other, the groups whose last server left frames without their proof: a point that it acked is not
    /// to stay hidden until its source comes back, which may be never.
    pub(super) fn recover_unproven(&self) {
        let recovered = self.catalog().map_err(anyhow::Error::from).and_then(|catalog| {
            for office in catalog.offices() {
                for place in self.store.groups(office.id)? {
                    if let Err(error) = self.recover_if_unproven(&office.name, place) {
                        let error = format!("{error:#}");
                        tracing::error!(office = office.name, group = %place.group, error, "a group cannot be recovered");
                    }
                }
            }
            Ok(())
        });
        if let Err(error) = recovered {
            tracing::error!(error = format!("{error:#}"), "the groups cannot be listed");
        }
    }

    fn recover_if_unproven(&self, office: &str, place: GroupPlace) -> anyhow::Result<()> {
        let group = open_group(&self.store, place)?;
        if group.view().unproven_bytes() == 0 {
            // One that is open can be healed, with its source or without.
            let is_healed = group.view().damages().iter().all(|damage| group.view().is_healed(damage));
            if !is_healed {
                self.on_thread(office, place, |_| Ok(()))?;
            }
        } else {
            self.on_thread(office, place, |_| Ok(()))?;
            tracing::info!(office, group = group.name(), "recovered what the last server left without its proof");
        }
        Ok(())
    }

    /// Reads the store again, segment by segment, until what is given back is dropped; nothing where that is switched off.
    pub(super) fn start_scrub(self: Arc<Self>) -> Option<mpsc::Sender<()>> {
        let interval = Duration::from_secs(self.store.config().scrub_interval_s);
        if interval.is_zero() {
            return None;
        }
        let (end, ended) = mpsc::channel();
        tokio::task::spawn_blocking(move || {
            let scrub = Scrub {
                store: &self.store,
                catalog: &|| self.catalog(),
                view: &|place| self.groups.view(place),
                found: &|office, place, file, damages| self.note_damages(office, place, file, damages),
                clock: &*self.clock,
                interval,
            };
            scrub.run(&ended);
        });
        Some(end)
    }

    /// Heals what is damaged in the groups that are open, until what is given back is dropped.
    pub(super) fn start_healer(self: Arc<Self>) -> mpsc::Sender<()> {
        let (end, ended) = mpsc::channel();
        tokio::task::spawn_blocking(move || {
            let tools = Tools {
                open: &|| self.open_groups(),
                keys: &|group| self.keys(group).map_err(|error| one_line(&error)),
                ask: &|group, volume, extents| {
                    let (office, id) = (&group.office, group.place.group);
                    Handle::current().block_on(self.receiver.send_again(office, id, volume, extents));
                },
                healed: &|group| self.look_again(group),
                clock: &*self.clock,
                random: &SystemRandom,
            };
            Healer::default().run(&tools, &ended);
        });
        end
    }

    fn open_groups(&self) -> Vec<OpenGroup> {
        let open = |(office, group, live): (String, GroupId, crate::receiver::LiveGroup)| {
            let place = self.groups.place(&office, group).ok()?;
            let view = self.groups.view(place)?;
            Some(OpenGroup { office, place, view, connected_since: live.connected_since })
        };
        self.receiver.live().into_iter().filter_map(open).collect()
    }

    fn keys(&self, group: &OpenGroup) -> Result<Keyring, CatalogError> {
        self.catalog()?.keys(&Group::served(group.place, Arc::clone(&group.view)))
    }

    fn look_again(&self, group: &OpenGroup) {
        let looked = self.on_thread(&group.office, group.place, |writer| {
            writer.look_again();
            Ok(())
        });
        if let Err(error) = looked {
            let error = format!("{error:#}");
            tracing::error!(office = group.office, group = %group.place.group, error, "repairs are not seen before the next start");
        }
    }

    /// Makes checkpoints and prunes, until what is given back is dropped.
    pub(super) fn start_maintenance(self: Arc<Self>) -> mpsc::Sender<()> {
        let (end, ended) = mpsc::channel();
        tokio::task::spawn_blocking(move || {
            let maintenance = Maintenance {
                store: &self.store,
                catalog: &|| self.catalog(),
                view: &|place| self.groups.view(place),
                change: &|office, place, change| {
                    let change = change.clone();
                    self.on_thread(office, place, move |writer| writer.adopt(&change))
                },
                is_leased: &|office, place| {
                    let oldest = self.on_thread(office, place, |writer| Ok(writer.oldest_lease()))?;
                    Ok(oldest.is_some())
                },
                clock: &*self.clock,
                random: &SystemRandom,
            };
            maintenance.run(&ended);
        });
        end
    }

    /// Has groups drilled when that is due, until what is given back is dropped; nothing where no drills are wanted.
    pub(super) fn start_drills(self: Arc<Self>) -> Option<mpsc::Sender<()>> {
        if self.store.config().drill_interval_s == 0 {
            return None;
        }
        let (end, ended) = mpsc::channel();
        tokio::task::spawn_blocking(move || {
            let (store, clock) = (&self.store, &*self.clock);
            Schedule { store, catalog: &|| self.catalog(), clock }.run(&ended);
        });
        Some(end)
    }

    /// Keeps what the scrub found in a file; whether it is kept.
    fn note_damages(&self, office: &str, place: GroupPlace, file: FileId, damages: Vec<Damage>) -> bool {
        for damage in &damages {
            let (offset, what) = (damage.offset, &damage.what);
            tracing::error!(office, group = %place.group, %file, offset, what, "damaged: `cdp-target verify` names the points");
        }
        let kept = self.on_thread(office, place, move |writer| writer.note_damages(file, &damages));
        if let Err(error) = &kept {
            let error = format!("{error:#}");
            tracing::error!(office, group = %place.group, error, "what a file was read as cannot be kept");
        }
        kept.is_ok()
    }

    /// Has the group's own thread do something with its writer; what it does not get to in time is never done.
    fn on_thread<T: Send + 'static>(
        &self,
        office: &str,
        place: GroupPlace,
        change: impl FnOnce(&mut dyn GroupWriter) -> Result<T, StoreError> + Send + 'static,
    ) -> anyhow::Result<T> {
        self.groups.admit(office, place.office);
        let (task, errand) = errand();
        let work = |writer: Result<&mut dyn GroupWriter, StoreError>| task.run(|| writer.and_then(change));
        // Where there is no room in the thread's queue for so long, the errand is dropped with the future.
        let queued = tokio::time::timeout(CHANGE_TIMEOUT, self.receiver.with_group(office, place.group, work));
        let patience = Handle::current().block_on(queued).map_or(Duration::ZERO, |()| CHANGE_TIMEOUT);
        let changed = errand.wait(patience).context("wait for the group's thread")?;
        changed.map_err(|error| match error {
            // Whose mistake it was is told by the journal's error.
            StoreError::Failed(error) => match error.downcast::<JournalError>() {
                Ok(error) => (*error).into(),
                Err(error) => StoreError::Failed(error).into(),
            },
            error => error.into(),
        })
    }

    /// Ends what runs: the connections, then the groups.
    pub(super) async fn end(self: Arc<Self>, running: JoinHandle<()>) {
        self.listener.close();
        let ended = tokio::time::timeout(CLOSE_TIMEOUT, async move {
            // A panic in it was logged; the groups are to be closed all the same.
            let _ = running.await;
            let closed = tokio::task::spawn_blocking(move || self.receiver.close()).await;
            closed.unwrap_or_else(|error| tracing::error!(%error, "the groups were not closed"));
        });
        if ended.await.is_err() {
            tracing::warn!("a group did not end in time; what it had not acked is sent again");
        }
    }

    fn report(&self) -> Result<StatusReport, CatalogError> {
        report(&self.store, &self.catalog()?, Some(self), Timestamp(self.clock.wall_ms()))
    }

    /// The catalogue, from the register as it is on disk.
    fn catalog(&self) -> Result<Catalog, AuthorityError> {
        let storage = Arc::clone(self.store.storage());
        let folder = self.store.authority_folder();
        let authority = Authority::open(storage, Arc::clone(&self.clock), Arc::new(SystemRandom), &folder)?;
        Ok(Catalog::new(&self.store, authority))
    }

    /// Sets the gauges, for ever.
    pub(super) async fn keep_metrics(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(METRICS_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let desk = Arc::clone(&self);
            let reported = tokio::task::spawn_blocking(move || desk.report()).await;
            match reported {
                Ok(Ok(report)) => metrics::record(&report, self.listener.connections()),
                Ok(Err(error)) => tracing::warn!(%error, "metrics are not up to date"),
                Err(error) => tracing::warn!(%error, "metrics are not up to date"),
            }
        }
    }
}
