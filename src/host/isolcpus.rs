//! The kernel's `isolcpus=` parameter.
//!
//! Owns the grammar of `kernel/sched/isolation.c` and `lib/bitmap.c` (bitmap_parselist). Does not know who read the
//! command line.
//!
//! ```text
//! isolcpus=[flag,...,]list     flags: nohz, domain, managed_irq; without a flag: domain
//! list    = region,...         empty regions are ignored
//! region  = range[:used/group]
//! range   = a | a-b | all      a, b: a number, or N for the last CPU
//! ```

use kcm_mount::model::cpuset::{CpuId, CpuSet};

/// Returns the CPUs that this command line isolates from the scheduler's domains. A value that the kernel refuses
/// isolates nothing.
pub(super) fn parse(cmdline: &str, known: &CpuSet) -> CpuSet {
    let last = known.iter().last().map_or(0, CpuId::get);
    let values = parameters(cmdline).filter_map(|word| word.strip_prefix("isolcpus=").map(str::to_owned));
    // The first valid value counts; the kernel refuses a later one that differs.
    let isolated = values.map(|value| isolated(&value, last)).find(|isolated| isolated.is_some());
    isolated.flatten().unwrap_or_default().intersection(known)
}

/// Returns the kernel's own parameters: those before a single `--`, after which they are for init. A value may be
/// quoted.
fn parameters(cmdline: &str) -> impl Iterator<Item = String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), String::new(), false);
    for c in cmdline.chars() {
        match c {
            '"' => quoted = !quoted,
            c if c.is_ascii_whitespace() && !quoted => words.push(std::mem::take(&mut word)),
            c => word.push(c),
        }
    }
    words.push(word);
    words.into_iter().take_while(|word| word != "--")
}

/// `None` if the kernel refuses the value; empty if it isolates CPUs from something other than scheduler domains.
fn isolated(value: &str, last: u32) -> Option<CpuSet> {
    let (mut rest, mut domain, mut flags) = (value, false, false);
    while rest.starts_with(|c: char| c.is_ascii_alphabetic()) {
        let (flag, behind) = rest.split_once(',').unwrap_or((rest, ""));
        if !flag.chars().all(|c| c.is_ascii_alphabetic() || c == '_') {
            return None;
        }
        domain |= flag == "domain";
        flags |= matches!(flag, "domain" | "nohz" | "managed_irq");
        rest = behind;
    }
    let cpus = list(rest, last)?;
    Some(if domain || !flags { cpus } else { CpuSet::new() })
}

fn list(text: &str, last: u32) -> Option<CpuSet> {
    let mut all = CpuSet::new();
    for region in text.split(|c: char| c == ',' || c.is_ascii_whitespace()).filter(|r| !r.is_empty()) {
        let (range, pattern) = match region.split_once(':') {
            Some((range, pattern)) => (range, Some(pattern)),
            None => (region, None),
        };
        let (first, end) = match range.split_once('-') {
            _ if range.eq_ignore_ascii_case("all") => (0, last),
            Some((first, end)) => (number(first, last)?, number(end, last)?),
            None => (number(range, last)?, number(range, last)?),
        };
        let (used, group) = match pattern {
            Some(pattern) => {
                let (used, group) = pattern.split_once('/')?;
                (number(used, last)?, number(group, last)?)
            }
            None => (1, 1),
        };
        if first > end || end > u32::from(CpuId::MAX) || group == 0 || used > group {
            return None;
        }
        all = all.union(
            &(first..=end).filter(|cpu| (cpu - first) % group < used).filter_map(CpuId::new).collect(),
        );
    }
    Some(all)
}

fn number(text: &str, last: u32) -> Option<u32> {
    match text {
        "N" => Some(last),
        text if text.bytes().all(|b| b.is_ascii_digit()) => text.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    fn parse(cmdline: &str) -> String {
        super::parse(cmdline, &"0-15".parse().unwrap()).to_string()
    }

    #[test]
    fn the_whole_grammar() {
        for (cmdline, isolated) in [
            ("", ""),
            ("root=/dev/sda quiet", ""),
            ("isolcpus=", ""),
            ("isolcpus=0,1,2,3,4,8,9,10,11,12", "0-4,8-12"),
            ("net.ifnames=0 isolcpus=1-3 quiet\n", "1-3"),
            ("isolcpus=domain,1-3", "1-3"),
            ("isolcpus=nohz,domain,1-3", "1-3"),
            ("isolcpus=managed_irq,domain,1-3", "1-3"),
            ("isolcpus=nohz,1-3", ""),
            ("isolcpus=managed_irq,1-3", ""),
            ("isolcpus=unknown,1-3", "1-3"),
            ("isolcpus=nohz,unknown,1-3", ""),
            ("isolcpus=bad1flag,1-3", ""),
            ("isolcpus=0-15:1/4", "0,4,8,12"),
            ("isolcpus=0-7:2/4,15", "0-1,4-5,15"),
            ("isolcpus=12-N", "12-15"),
            ("isolcpus=0,all:1/2", "0,2,4,6,8,10,12,14"),
            ("isolcpus=1,,3,", "1,3"),
            ("isolcpus=\"1, 3\" quiet", "1,3"),
            ("isolcpus=3-1", ""),
            ("isolcpus=1-3:0/0", ""),
            ("isolcpus=1-3:3/2", ""),
            ("isolcpus=1-x", ""),
            ("isolcpus=-1", ""),
            ("isolcpus=0-4294967295", ""),
            ("isolcpus=14-20", "14-15"),
            ("isolcpus=1 isolcpus=2", "1"),
            ("isolcpus=bad-list isolcpus=2", "2"),
            ("quiet -- isolcpus=1", ""),
            ("nohz_full=1-3 myisolcpus=1", ""),
        ] {
            assert_eq!(parse(cmdline), isolated, "{cmdline:?}");
        }
    }
}
