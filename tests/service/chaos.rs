//! A short run of what `cargo xtask bench chaos` does for minutes.

use anyhow::Result;
use holdfast_tests::LEASE;
use holdfast_tests::chaos::{self, Length};

#[test]
fn nothing_is_lost_while_everything_breaks() -> Result<()> {
    let report = chaos::run(1, Length::Faults(12), &mut |line| println!("{line}"))?;
    println!("{report}");
    // Beside other tests, so this bounds no speed: the bench holds it to ten seconds beyond the lease.
    assert!(report.recovery_seconds <= LEASE.as_secs_f64() + 60.0, "{report}");
    Ok(())
}
