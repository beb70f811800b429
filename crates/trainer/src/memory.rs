//! Memory that is there for a run.

/// Memory this process may use: what the machine has left and what its control group allows, whichever is less. `None` where
/// neither says.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
        Some(kib * 1024)
    });
    let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
    // Files that were read count as used and make room as soon as it is needed.
    let stat = read("/sys/fs/cgroup/memory.stat").unwrap_or_default();
    let fields = stat.lines().filter_map(|line| line.split_once(' '));
    let cached = fields.filter(|(name, _)| matches!(*name, "inactive_file" | "active_file"));
    let cached: u64 = cached.filter_map(|(_, bytes)| bytes.parse::<u64>().ok()).sum();
    let used = || number("/sys/fs/cgroup/memory.current").unwrap_or(0).saturating_sub(cached);
    let group = number("/sys/fs/cgroup/memory.max").map(|limit| limit.saturating_sub(used()));
    [machine, group].into_iter().flatten().min()
}
