//! Parses values of the command line into domain types.
//!
//! Owns the checks that need only the text. Does not know the machine or the cluster. clap prints the errors with the
//! name of the flag, and the program exits with the status for wrong usage.

use std::time::Duration;

use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::model::pool::PoolName;

use crate::host_command::HostCommand;

/// How long to wait; `None` means without limit.
pub(crate) type Wait = Option<Duration>;

/// How often a command runs (`--interval`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Repeat {
    Once,
    Every(Duration),
}

/// The commands that `cluster-init` runs on each host, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostCommands(pub(crate) Vec<HostCommand>);

/// A number of cores (`--num-dp-cores`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cores {
    /// A number that is made for the machine.
    Auto,
    Number(usize),
}

impl std::fmt::Display for Cores {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Number(number) => number.fmt(f),
        }
    }
}

/// A taint of a node (`--taint`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TaintSpec {
    pub(crate) key: String,
    pub(crate) value: Option<String>,
    pub(crate) effect: String,
}

/// Parses a number of cores, or `auto`.
pub(super) fn cores(text: &str) -> Result<Cores, String> {
    match text {
        "auto" => Ok(Cores::Auto),
        _ => text.parse().map(Cores::Number).map_err(|_| "neither a number of cores nor auto".into()),
    }
}

/// Parses a taint in the form of kubectl-taint(1), `key[=value]:effect`.
pub(super) fn taint(text: &str) -> Result<TaintSpec, String> {
    const EFFECTS: [&str; 3] = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
    let (taint, effect) = text.split_once(':').ok_or("not a taint: key[=value]:effect")?;
    if !EFFECTS.contains(&effect) {
        return Err(format!("{effect:?}: not an effect; there are {}", EFFECTS.join(", ")));
    }
    let (key, value) = match taint.split_once('=') {
        Some((key, value)) => (key, Some(value).filter(|value| !value.is_empty())),
        None => (taint, None),
    };
    let (prefix, name) = key.rsplit_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    if !is_label_value(name) || prefix.is_some_and(|prefix| !is_dns_name(prefix)) {
        return Err(format!(
            "{key:?}: not a key; it is [prefix/]name, with letters, digits, -, _ and . in the name"
        ));
    }
    if let Some(value) = value.filter(|value| !is_label_value(value)) {
        return Err(format!("{value:?}: not a value; it has at most 63 letters, digits, -, _ and ."));
    }
    Ok(TaintSpec { key: key.into(), value: value.map(str::to_owned), effect: effect.into() })
}

/// Whether Kubernetes takes this for the value of a label or a taint, which is not empty: at most 63 characters, a letter or a
/// digit at both ends. The name of a qualified name has the same form.
fn is_label_value(text: &str) -> bool {
    let bytes = text.as_bytes();
    let alphanumeric = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    text.len() <= 63
        && alphanumeric(bytes.first())
        && alphanumeric(bytes.last())
        && bytes.iter().all(|b| alphanumeric(Some(b)) || b"-_.".contains(b))
}

/// Parses `--kcm-cmd-list`.
pub(super) fn host_commands(text: &str) -> Result<HostCommands, String> {
    let mut commands = Vec::new();
    for (index, word) in text.split(',').map(str::trim).enumerate() {
        let known = HostCommand::ALL.into_iter().find(|command| command.name() == word);
        let Some(command) = known else {
            let all = HostCommand::ALL.map(HostCommand::name).join(", ");
            return Err(format!("{word:?}: KCM command should be one of {all}"));
        };
        if command == HostCommand::Init && index > 0 {
            return Err("init command should be run and listed first".into());
        }
        if commands.contains(&command) {
            return Err(format!("{word} is listed twice"));
        }
        commands.push(command);
    }
    Ok(HostCommands(commands))
}

/// Parses `--cpus`: at least one CPU.
pub(super) fn cpus(text: &str) -> Result<CpuSet, String> {
    CpuSet::from_name(text).map_err(|error| error.to_string())
}

/// Parses the name of a pool.
pub(super) fn pool(text: &str) -> Result<String, String> {
    text.parse::<PoolName>().map(|name| name.to_string()).map_err(|error| error.to_string())
}

/// Parses the name of a CPU list, which stays as it is written.
pub(super) fn list(text: &str) -> Result<String, String> {
    cpus(text).map(|_| text.to_owned())
}

/// Parses the name of a node or of a service account.
pub(super) fn host(text: &str) -> Result<String, String> {
    let name = text.trim();
    if is_dns_name(name) { Ok(name.into()) } else { Err("not a name that Kubernetes allows".into()) }
}

/// Parses the name of a namespace, a DNS label (RFC 1123).
pub(super) fn namespace(text: &str) -> Result<String, String> {
    let is_label = is_dns_name(text) && text.len() <= 63 && !text.contains('.');
    if is_label { Ok(text.into()) } else { Err("not the name of a namespace".into()) }
}

/// Whether a Kubernetes node can have this name: a DNS subdomain (RFC 1123).
pub(crate) fn is_dns_name(name: &str) -> bool {
    let is_label = |label: &str| {
        let alphanumeric = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let bytes = label.as_bytes();
        alphanumeric(bytes.first().copied())
            && alphanumeric(bytes.last().copied())
            && bytes.iter().all(|&b| alphanumeric(Some(b)) || b == b'-')
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

/// Parses a number of seconds, or `inf`.
pub(super) fn wait(text: &str) -> Result<Wait, String> {
    if text == "inf" { Ok(None) } else { seconds(text).map(|(_, wait)| Some(wait)) }
}

/// Parses `--interval`: a number of seconds, where 0 means once.
pub(super) fn repeat(text: &str) -> Result<Repeat, String> {
    match seconds(text)? {
        (0.0, _) => Ok(Repeat::Once),
        // Less than a nanosecond is not "once", and nothing can run so often.
        (_, interval) if interval.is_zero() => Err("not a number of seconds".into()),
        (_, interval) => Ok(Repeat::Every(interval)),
    }
}

/// Parses the interval of a view: at least a tenth of a second, because it costs the machine something.
pub(super) fn interval(text: &str) -> Result<Duration, String> {
    match seconds(text)? {
        (_, interval) if interval < Duration::from_millis(100) => Err("less than 0.1 seconds".into()),
        (_, interval) if interval > Duration::from_secs(86_400) => Err("more than a day".into()),
        (_, interval) => Ok(interval),
    }
}

/// Parses a number of seconds that a `Duration` can hold; also returns the number itself.
fn seconds(text: &str) -> Result<(f64, Duration), String> {
    let number: Option<f64> = text.parse().ok();
    let seconds = number.and_then(|number| Some((number, Duration::try_from_secs_f64(number).ok()?)));
    seconds.ok_or_else(|| "not a number of seconds".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_nodes() {
        for name in ["n", "kcm-02-zzwt7w", "a.b-c.d", "10"] {
            assert!(is_dns_name(name), "{name}");
        }
        let long = "a".repeat(254);
        for name in ["", "-a", "a-", "A", "a_b", "a..b", ".a", "a/b", "a b", &long] {
            assert!(!is_dns_name(name), "{name:?}");
        }
    }

    #[test]
    fn a_namespace_is_one_label() {
        assert!(namespace("kube-system").is_ok());
        assert!(namespace("a.b").is_err());
        assert!(namespace(&"a".repeat(64)).is_err());
    }

    #[test]
    fn cores_are_a_number_or_auto() {
        assert_eq!(cores("auto"), Ok(Cores::Auto));
        assert_eq!(cores("0"), Ok(Cores::Number(0)));
        for text in ["", "-1", "Auto", "all", "1.5"] {
            assert!(cores(text).is_err(), "{text:?}");
        }
        assert_eq!([Cores::Auto, Cores::Number(3)].map(|cores| cores.to_string()), ["auto", "3"]);
    }

    #[test]
    fn a_taint_is_one_that_kubectl_takes() {
        let spec = |key: &str, value: Option<&str>, effect: &str| {
            Ok(TaintSpec { key: key.into(), value: value.map(str::to_owned), effect: effect.into() })
        };
        for (text, expected) in [
            ("kcm=true:NoSchedule", spec("kcm", Some("true"), "NoSchedule")),
            ("kcm:NoExecute", spec("kcm", None, "NoExecute")),
            ("kcm=:NoExecute", spec("kcm", None, "NoExecute")),
            ("a.b-c/d_E.1=x-1:PreferNoSchedule", spec("a.b-c/d_E.1", Some("x-1"), "PreferNoSchedule")),
        ] {
            assert_eq!(taint(text), expected, "{text}");
        }
        let long = format!("k={}:NoSchedule", "v".repeat(64));
        for text in [
            "",
            "kcm",
            "kcm=true",
            "kcm=true:",
            "kcm=true:NoRun",
            "kcm=true:noschedule",
            "=true:NoSchedule",
            "-k:NoSchedule",
            "k=-v:NoSchedule",
            "a/b/c:NoSchedule",
            "A/b:NoSchedule",
            "/b:NoSchedule",
            "a b:NoSchedule",
            "k=a=b:NoSchedule",
            "k=a:b:NoSchedule",
            &long,
        ] {
            assert!(taint(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn an_interval_is_zero_or_a_duration() {
        assert_eq!(repeat("0"), Ok(Repeat::Once));
        assert_eq!(repeat("0.5"), Ok(Repeat::Every(Duration::from_millis(500))));
        for text in ["-1", "soon", "inf", "nan", "1e-12", "1e30", ""] {
            assert!(repeat(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_view_changes_at_most_ten_times_a_second() {
        assert_eq!(interval("0.1"), Ok(Duration::from_millis(100)));
        for text in ["0", "0.09", "-1", "soon", "inf", "86401"] {
            assert!(interval(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_wait_may_be_without_limit() {
        assert_eq!(wait("inf"), Ok(None));
        assert_eq!(wait("1.5"), Ok(Some(Duration::from_millis(1500))));
        assert!(wait("-1").is_err());
    }

    #[test]
    fn host_commands_are_known_distinct_and_begin_with_init() {
        use HostCommand::{Init, Install};
        assert_eq!(host_commands("init, install"), Ok(HostCommands(vec![Init, Install])));
        for (text, error) in [
            ("", "KCM command should be one of"),
            ("install,init", "init command should be run and listed first"),
            ("install,install", "install is listed twice"),
        ] {
            assert!(host_commands(text).unwrap_err().contains(error), "{text:?}");
        }
    }
}
