//! Which addresses a tenant may have the service call.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// Checks where a webhook wants to be told; the error is what is wrong with the URL, in a sentence.
pub(crate) fn check_url(text: &str, allow_private: bool) -> Result<(), String> {
    const MAX_URL_BYTES: usize = 2048;
    if text.len() > MAX_URL_BYTES {
        return Err(format!("url has at most {MAX_URL_BYTES} bytes"));
    }
    if text.chars().any(char::is_control) {
        return Err("url holds a control character".into());
    }
    let url = Url::parse(text).map_err(|e| format!("url is no URL: {e}"))?;
    if url.scheme() != "https" && !(allow_private && url.scheme() == "http") {
        return Err("url must begin with https://".into());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("url must not hold a name or a password; what it is told is signed".into());
    }
    let refused = "url leads to an address that is not public; the operator of this service does not allow that";
    match url.host() {
        None => Err("url names no host".into()),
        Some(_) if allow_private => Ok(()),
        Some(Host::Ipv4(ip)) if !is_public(ip.into()) => Err(refused.into()),
        Some(Host::Ipv6(ip)) if !is_public(ip.into()) => Err(refused.into()),
        Some(Host::Domain(name)) if name == "localhost" || name.ends_with(".localhost") => Err(refused.into()),
        Some(_) => Ok(()),
    }
}

/// Whether an address belongs to the public internet: not to this machine, a private or a shared network, a link, a
/// documentation, a benchmark or a multicast range, and not one of those in an IPv6 disguise.
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    let special = ip.is_private()
        || ip.is_loopback()
        || ip.is_link_local()
        || ip.is_documentation()
        || ip.is_multicast()
        || a == 0
        || (a == 100 && (64..128).contains(&b))
        || (a == 192 && b == 0 && c == 0)
        || (a == 192 && b == 88 && c == 99)
        || (a == 198 && (18..20).contains(&b))
        || a >= 240;
    !special
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    if let Some(inner) = ip.to_ipv4_mapped() {
        return is_public_v4(inner);
    }
    let [first, second, ..] = ip.segments();
    // Only 2000::/3 is given out for the public internet; within it some ranges carry or stand for other addresses.
    let carries_another = first == 0x2002 || (first == 0x2001 && second < 0x0200) || (first == 0x2001 && second == 0x0db8);
    (first & 0xe000) == 0x2000 && !carries_another && !(first == 0x3fff && second < 0x1000)
}

/// Resolves names, and leaves out what a tenant may not have the service call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guarded {
    pub(crate) allow_private: bool,
}

impl Resolve for Guarded {
    fn resolve(&self, name: Name) -> Resolving {
        let allow_private = self.allow_private;
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> = found.filter(|address| allow_private || is_public(address.ip())).collect();
            if allowed.is_empty() {
                return Err(io::Error::other("the name leads to no public address").into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_address_of_this_side_is_public() {
        let private = [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "255.255.255.255",
            "224.0.0.1",
            "198.18.0.1",
            "192.0.0.8",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2001:db8::1",
            "2001::1",
            "3fff::1",
        ];
        for text in private {
            assert!(!is_public(text.parse().expect("an address")), "{text}");
        }
        for text in ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001::200e"] {
            assert!(is_public(text.parse().expect("an address")), "{text}");
        }
    }

    #[test]
    fn a_url_is_https_and_names_no_private_host() {
        for url in [
            "http://example.com/",
            "ftp://example.com/",
            "https://127.0.0.1/",
            "https://[::1]/",
            "https://localhost/",
            "https://a.localhost/",
            "https://user:secret@example.com/",
            "https://2130706433/",
            "https://0x7f.1/",
            "no url",
            "https://",
        ] {
            assert!(check_url(url, false).is_err(), "{url}");
        }
        assert_eq!(check_url("https://example.com/hook?a=b", false), Ok(()));
        assert_eq!(check_url("http://127.0.0.1:9000/", true), Ok(()));
    }

    #[tokio::test]
    async fn a_name_that_leads_here_is_not_followed() {
        let name = || -> Name { "localhost".parse().expect("a name") };
        assert!(Guarded { allow_private: false }.resolve(name()).await.is_err());
        assert!(Guarded { allow_private: true }.resolve(name()).await.is_ok());
    }
}
