//! First copy of incompressible data, both ends on this machine, against a bare quinn stream of as many bytes.
//!
//! The bare stream has the transport's limits and socket buffers that the programs have, and cipher suites of the same
//! library: what differs is what is done with the bytes. Both ends share the processors, so the time that they are kept
//! busy is printed beside the throughput: that figure stands even where other programs run.

use crate::median;
use anyhow::{Context, Result, ensure};
use cdp_seams::quic;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::{cpu_time, wait_for};
use cdp_tests::site::Site;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const BYTES: usize = 1 << 30;
const CHUNK: usize = 1 << 20;
const ROUNDS: usize = 3;

pub(crate) fn run(folder: &Path) -> Result<()> {
    let device = LoopDevice::new(&folder.join("first.img"), BYTES as u64)?;
    let mut node = std::fs::File::options().write(true).open(device.node())?;
    let mut noise = vec![0; CHUNK];
    for chunk in 0..BYTES / CHUNK {
        cdp_tests::files::noise(chunk as u64, &mut noise);
        node.write_all(&noise)?;
    }
    node.sync_all()?;
    let (mut copies, mut bare) = (Vec::new(), Vec::new());
    for round in 0..rounds()? {
        bare.push(bare_stream()?);
        copies.push(first_copy(&device, &folder.join(format!("round-{round}")))?);
    }
    let ratios: Vec<f64> = copies.iter().zip(&bare).map(|(copy, bare)| copy.rate() / bare.rate()).collect();
    println!(
        "\n| {} MiB, incompressible, median of {} | MB/s | CPU seconds a GiB |\n|---|---|---|",
        BYTES >> 20,
        bare.len()
    );
    print_row("a bare quinn stream, nothing read or kept", &bare, |run| run.cpu);
    print_row("first copy: read, sealed, sent, checked, journaled, synced", &copies, |run| run.cpu);
    print_row("of that the office", &copies, |run| run.cpu_source);
    let spread = ratios.iter().fold((f64::MAX, 0_f64), |(low, high), ratio| (low.min(*ratio), high.max(*ratio)));
    println!("| ratio, pair by pair (aim 0.7) | {:.2} ({:.2} to {:.2}) | |", median(&ratios), spread.0, spread.1);
    Ok(())
}

/// What one run took.
struct Taken {
    time: Duration,
    /// Of both ends together, without what the kernel does in threads of its own.
    cpu: Duration,
    /// Of the sending end, where that is a process of its own.
    cpu_source: Duration,
}

impl Taken {
    fn rate(&self) -> f64 {
        BYTES as f64 / self.time.as_secs_f64() / 1e6
    }
}

fn print_row(what: &str, runs: &[Taken], cpu: impl Fn(&Taken) -> Duration) {
    let rates: Vec<f64> = runs.iter().map(Taken::rate).collect();
    let gib = BYTES as f64 / f64::from(1 << 30);
    let seconds: Vec<f64> = runs.iter().map(|run| cpu(run).as_secs_f64() / gib).collect();
    println!("| {what} | {:.0} | {:.2} |", median(&rates), median(&seconds));
}

/// Pairs of runs; `CDP_BENCH_ROUNDS` asks for another number.
fn rounds() -> Result<usize> {
    std::env::var("CDP_BENCH_ROUNDS").map_or(Ok(ROUNDS), |text| text.parse().context("CDP_BENCH_ROUNDS"))
}

/// From the agent's start to the first recovery point.
fn first_copy(device: &LoopDevice, folder: &Path) -> Result<Taken> {
    std::fs::create_dir(folder)?;
    let mut site = Site::new(folder)?;
    site.source(&["protect", &format!("data={}", device.node().display())])?;
    let before = site.target_daemon().cpu_time()?;
    let start = Instant::now();
    site.start_source()?;
    // Asks the agent, which knows it at once, and not the store: reading it would take from what is measured.
    wait_for("the first point", Duration::from_secs(300), || {
        std::thread::park_timeout(Duration::from_millis(30));
        Ok(site.source_status().ok().filter(|status| status["acked_epoch"].is_u64()))
    })?;
    let time = start.elapsed();
    let cpu_source = site.source_daemon().cpu_time()?;
    let cpu = cpu_source + site.target_daemon().cpu_time()?.saturating_sub(before);
    site.stop_source()?;
    site.source(&["unprotect", "data"])?;
    site.stop_target()?;
    std::fs::remove_dir_all(folder)?;
    Ok(Taken { time, cpu, cpu_source })
}

/// The same number of bytes through one stream, a runtime of its own at each end.
fn bare_stream() -> Result<Taken> {
    let issued = rcgen::generate_simple_self_signed(vec!["localhost".into()])?;
    let certificate = issued.cert.der().clone();
    let key =
        rustls::pki_types::PrivateKeyDer::try_from(issued.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let server_tls = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key)?;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate)?;
    let client_tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();

    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let (tell, told) = std::sync::mpsc::channel();
    let far_end = std::thread::spawn(move || -> Result<usize> {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(async move {
            let endpoint = quic::server_endpoint(any, server_tls, &[7; 32])?;
            tell.send(endpoint.local_addr()?)?;
            let connection = endpoint.accept().await.context("a connection")?.await?;
            quic::admit(&connection);
            let mut stream = connection.accept_uni().await?;
            let mut received = 0;
            while let Some(chunk) = stream.read_chunk(usize::MAX, true).await? {
                received += chunk.bytes.len();
            }
            Ok(received)
        })
    });
    let address = told.recv()?;
    let sending = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let began = sending.block_on(async {
        let endpoint = quic::client_endpoint(address, client_tls)?;
        let connection = endpoint.connect(address, "localhost")?.await?;
        let chunk = vec![0x5a; CHUNK];
        let mut stream = connection.open_uni().await?;
        let start = (Instant::now(), cpu_time(std::process::id())?);
        for _ in 0..BYTES / CHUNK {
            stream.write_all(&chunk).await?;
        }
        stream.finish()?;
        stream.stopped().await?;
        anyhow::Ok(start)
    })?;
    let (time, cpu) = (began.0.elapsed(), cpu_time(std::process::id())?.saturating_sub(began.1));
    let received = far_end.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
    ensure!(received == BYTES, "{received} bytes arrived");
    Ok(Taken { time, cpu, cpu_source: Duration::ZERO })
}
