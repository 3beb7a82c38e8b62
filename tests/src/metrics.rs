//! The metrics that the programs serve, as a monitoring system asks for them.

use anyhow::Result;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;

/// Has the program of this configuration file serve its metrics from its next start on; gives the address.
pub fn serve(config: &Path) -> Result<String> {
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let text = std::fs::read_to_string(config)?;
    std::fs::write(config, format!("metrics_listen = \"{address}\"\n{text}"))?;
    Ok(address)
}

/// What `GET /metrics` answers.
pub fn scrape(address: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
