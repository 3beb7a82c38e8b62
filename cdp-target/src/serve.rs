//! The server: what runs while `serve` runs, and in which order it starts and ends.
//!
//! Invariant: it holds the store's lock from before the first connection until after the last sync. A signal closes the
//! connections, lets what was appended become durable, and ends within `CLOSE_TIMEOUT`; what is not acked by then the
//! sources send again.

mod desk;

use crate::authority::Authority;
use crate::control::{ControlSocket, Handler};
use crate::groups::StoreGroups;
use crate::listener::{ListenError, Listener, ListenerLimits, Serve};
use crate::metrics;
use crate::receiver::Receiver;
use crate::status::KnownGroups;
use crate::store::{Store, StoreLock};
use cdp_seams::clock::{Clock, SystemClock};
use cdp_seams::service::{self, Watchdog};
use desk::Desk;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What sources are told about this program.
const SOFTWARE: &str = concat!("cdp-target ", env!("CARGO_PKG_VERSION"));
/// How long a group's thread may take to get to a change.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a clean end may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(20);
/// How often the watchdog is looked after.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// How often the gauges are set.
const METRICS_INTERVAL: Duration = Duration::from_secs(15);

/// Why the server cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The port.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The control socket.
    #[error("bind control socket {}", .path.display())]
    Control {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The metrics exporter.
    #[error("export metrics on {address}")]
    Metrics {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: metrics_exporter_prometheus::BuildError,
    },
    /// The runtime, or the signals.
    #[error("start the server")]
    Start(#[from] io::Error),
}

/// A server that is about to run.
pub struct Server {
    store: Store,
    authority: Authority,
    _lock: StoreLock,
}

impl Server {
    /// A server over a store whose lock is held.
    #[must_use]
    pub const fn new(store: Store, lock: StoreLock, authority: Authority) -> Self {
        Self { store, authority, _lock: lock }
    }

    /// Runs until a signal ends it.
    ///
    /// # Errors
    /// Where it cannot start.
    pub fn run(self) -> Result<(), ServeError> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let ended = runtime.block_on(self.serve());
        // What still runs on blocking threads was given its time.
        runtime.shutdown_timeout(Duration::from_secs(1));
        ended
    }

    async fn serve(self) -> Result<(), ServeError> {
        let mut signals = Signals::new()?;
        // First of all: a command that finds the lock taken looks for the socket.
        let path = self.store.socket();
        let control = ControlSocket::bind(&path).map_err(|source| ServeError::Control { path, source })?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let authority = Arc::new(Mutex::new(self.authority));
        let listen = self.store.config().listen;
        let listener = Listener::bind(listen, Arc::clone(&authority), Arc::clone(&clock), ListenerLimits::default())?;
        let address = listener.local_address()?;
        let metrics_listen = self.store.config().metrics_listen;
        if let Some(address) = metrics_listen {
            metrics::start(address).map_err(|source| ServeError::Metrics { address, source })?;
        }
        let groups = Arc::new(StoreGroups::new(self.store.clone()));
        let receiver = Receiver::new(Arc::clone(&groups) as Arc<_>, Arc::clone(&clock), SOFTWARE);
        let desk = Arc::new(Desk {
            store: self.store,
            authority,
            groups,
            receiver,
            listener,
            address,
            clock,
            known: KnownGroups::default(),
        });

        let running = Arc::clone(&desk);
        let mut running =
            tokio::spawn(async move { running.listener.run(Arc::clone(&running) as Arc<dyn Serve>).await });
        let recovering = Arc::clone(&desk);
        tokio::task::spawn_blocking(move || recovering.recover_unproven());
        let end_scrub = Arc::clone(&desk).start_scrub();
        let end_maintenance = Arc::clone(&desk).start_maintenance();
        let end_healer = Arc::clone(&desk).start_healer();
        let end_drills = Arc::clone(&desk).start_drills();
        eprintln!("listening on {address}");
        tell_systemd(service::READY);
        tokio::select! {
            ended = &mut running => tracing::error!(?ended, "the listener ended"),
            () = control.serve(Arc::clone(&desk) as Arc<dyn Handler>) => {}
            () = Desk::keep_metrics(Arc::clone(&desk)), if metrics_listen.is_some() => {}
            () = keep_watchdog(Arc::clone(&desk.clock)) => {}
            name = signals.next() => tracing::info!(signal = name, "ending"),
        }
        tell_systemd(service::STOPPING);
        drop((control, end_scrub, end_maintenance, end_healer, end_drills));
        desk.end(running).await;
        Ok(())
    }
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

/// Tells the service manager's watchdog that the threads go on, for ever.
async fn keep_watchdog(clock: Arc<dyn Clock>) {
    let Some(mut watchdog) = Watchdog::of_environment() else { return std::future::pending().await };
    let mut ticks = tokio::time::interval(WATCH_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut said = None;
    loop {
        ticks.tick().await;
        let stuck = watchdog.look(clock.monotonic()).unwrap_or_else(|error| {
            tracing::debug!(%error, "the watchdog was not told");
            None
        });
        if stuck != said {
            if let Some(thread) = &stuck {
                tracing::error!(thread, "a thread does not go on: the watchdog is not told until it does");
            }
            said = stuck;
        }
    }
}

fn tell_systemd(state: &str) {
    if let Err(error) = service::tell(state) {
        tracing::debug!(%error, "systemd was not told");
    }
}
