//! First copy of incompressible data, both ends on this machine, against a bare quinn stream of as many bytes.

use crate::median;
use anyhow::{Context, Result, ensure};
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::wait_for;
use cdp_tests::site::Site;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
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
    for round in 0..ROUNDS {
        bare.push(BYTES as f64 / bare_stream()?.as_secs_f64() / 1e6);
        copies.push(BYTES as f64 / first_copy(&device, &folder.join(format!("round-{round}")))?.as_secs_f64() / 1e6);
    }
    let ratios: Vec<f64> = copies.iter().zip(&bare).map(|(copy, bare)| copy / bare).collect();
    println!("\n| {} MiB, incompressible | MB/s, median of {ROUNDS} |\n|---|---|", BYTES >> 20);
    println!("| a bare quinn stream, nothing read or kept | {:.0} |", median(&bare));
    println!("| first copy: read, sealed, sent, checked, journaled, synced | {:.0} |", median(&copies));
    println!("| ratio, pair by pair (aim 0.7) | {:.2} |", median(&ratios));
    Ok(())
}

/// From the agent's start to the first recovery point.
fn first_copy(device: &LoopDevice, folder: &Path) -> Result<Duration> {
    std::fs::create_dir(folder)?;
    let mut site = Site::new(folder)?;
    site.source(&["protect", &format!("data={}", device.node().display())])?;
    let start = Instant::now();
    site.start_source()?;
    // Asks the agent, which knows it at once, and not the store: reading it would take from what is measured.
    wait_for("the first point", Duration::from_secs(300), || {
        std::thread::park_timeout(Duration::from_millis(100));
        Ok(site.source_status().ok().filter(|status| status["acked_epoch"].is_u64()))
    })?;
    let taken = start.elapsed();
    site.stop_source()?;
    site.source(&["unprotect", "data"])?;
    site.stop_target()?;
    std::fs::remove_dir_all(folder)?;
    Ok(taken)
}

/// The same number of bytes through one stream of quinn with its own defaults, a runtime of its own at each end.
fn bare_stream() -> Result<Duration> {
    let issued = rcgen::generate_simple_self_signed(vec!["localhost".into()])?;
    let certificate = issued.cert.der().clone();
    let key =
        rustls::pki_types::PrivateKeyDer::try_from(issued.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key)?;
    let server_config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate)?;
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let client_config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));

    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let (tell, told) = std::sync::mpsc::channel();
    let far_end = std::thread::spawn(move || -> Result<usize> {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(async move {
            let endpoint = quinn::Endpoint::server(server_config, any)?;
            tell.send(endpoint.local_addr()?)?;
            let connection = endpoint.accept().await.context("a connection")?.await?;
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
        let mut endpoint = quinn::Endpoint::client(any)?;
        endpoint.set_default_client_config(client_config);
        let connection = endpoint.connect(address, "localhost")?.await?;
        let chunk = vec![0x5a; CHUNK];
        let start = Instant::now();
        let mut stream = connection.open_uni().await?;
        for _ in 0..BYTES / CHUNK {
            stream.write_all(&chunk).await?;
        }
        stream.finish()?;
        stream.stopped().await?;
        anyhow::Ok(start)
    })?;
    let taken = began.elapsed();
    let received = far_end.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
    ensure!(received == BYTES, "{received} bytes arrived");
    Ok(taken)
}
