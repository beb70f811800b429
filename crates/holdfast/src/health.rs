//! Whether the API on this machine lives.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};

/// How long it may take to say so.
const PATIENCE: Duration = Duration::from_secs(4);

/// `holdfast health`.
///
/// # Errors
/// When the API does not say that it lives.
pub fn ask(listen: SocketAddr) -> Result<()> {
    // One that listens everywhere is asked here.
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let url = format!("http://{}/healthz", SocketAddr::new(ip, listen.port()));
    let request = ureq::get(&url).config().timeout_global(Some(PATIENCE)).proxy(None).build();
    request.call().with_context(|| format!("{url} does not say that the API lives (HOLDFAST_LISTEN)"))?;
    Ok(())
}
