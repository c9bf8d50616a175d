//! The man page of a command.
//!
//! Owns the sections and their order, as in man-pages(7). Options come from clap_mangen; the sections after them come from
//! the text after the help of the command, so that help and page say the same. Does not know any command.
//!
//! A line `Examples:` begins a section, and the indented lines below it are printed as they are. `Exit status: …` is a
//! section on one line. Other paragraphs belong to the description.

use anyhow::Error;
use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};

use super::heading::{MANUAL, date, source};

/// The exit status of a command that has no other one.
const EXIT_STATUS: &str = "0 success, 1 failure, 2 wrong usage.";
/// The files of each page, whatever its command reads.
const FILES: [(&str, &str); 6] = [
    ("/etc/kcm", "the configuration directory, see kcm(5)"),
    ("/var/lib/kcm", "the state directory: pools, claims, and the log of a daemon in the background"),
    ("kcm.service", "the unit of the daemon, see systemctl(1)"),
    ("/etc/cdi/kcm.intel.com-*.json", "the pools as devices of containers, see kcm-cdi(1)"),
    ("kcm-cdi.service", "the unit that keeps these files up to date"),
    (
        "/var/lib/kubelet/device-plugins/kcm-*.sock",
        "the pools as resources of the kubelet, see kcm-device-plugin(1)",
    ),
];

/// A section that was made from the text after the help.
#[derive(Debug, PartialEq, Eq)]
struct Section {
    title: String,
    lines: Vec<String>,
    /// Whether line breaks and blanks are kept.
    is_verbatim: bool,
}

/// Returns the page of a command of this program.
pub(super) fn of_command(program: &Command, command: &Command) -> Result<Vec<u8>, Error> {
    let is_program = command.get_name() == program.get_name();
    let command = &command.clone().subcommand_help_heading("COMMANDS");
    let man = Man::new(command.clone()).date(date()).source(source()).manual(MANUAL);
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let (mut sections, paragraphs) = split(&help);
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    let mut description = Roff::new();
    for text in paragraphs {
        description.control("PP", []).text([roman(text)]);
    }
    page.extend_from_slice(description.to_roff().as_bytes());
    man.render_options_section(&mut page)?;
    if command.get_subcommands().next().is_some() {
        man.render_subcommands_section(&mut page)?;
    }
    let mut take = |title: &str| {
        let place = sections.iter().position(|section| section.title == title)?;
        Some(sections.remove(place))
    };
    let (status, environment, examples) = (take("EXIT STATUS"), take("ENVIRONMENT"), take("EXAMPLES"));
    let mut rest = Roff::new();
    rest.control("SH", ["EXIT STATUS"]);
    if let Some(status) = &status {
        lines(&mut rest, status);
    } else {
        rest.text([roman(EXIT_STATUS)]);
    }
    rest.control("SH", ["ENVIRONMENT"]);
    if let Some(environment) = &environment {
        terms(&mut rest, environment);
    }
    if !is_program {
        rest.control("PP", []).text([bold("kcm"), roman("(1) lists the variables that all commands read.")]);
    }
    rest.control("SH", ["FILES"]);
    for (file, about) in FILES {
        rest.control("TP", []).text([italic(file)]).text([roman(about)]);
    }
    for section in examples.iter().chain(&sections) {
        rest.control("SH", [section.title.as_str()]);
        lines(&mut rest, section);
    }
    rest.control("SH", ["SEE ALSO"]);
    see_also(&mut rest, program, command);
    page.extend_from_slice(rest.to_roff().as_bytes());
    Ok(page)
}

/// Splits the text after a help into sections and paragraphs.
fn split(help: &str) -> (Vec<Section>, Vec<String>) {
    let (mut sections, mut paragraphs) = (Vec::<Section>::new(), Vec::<String>::new());
    let mut is_open = false;
    for line in help.lines() {
        if line.starts_with(' ') {
            match sections.last_mut().filter(|section| is_open && section.is_verbatim) {
                Some(section) => section.lines.push(line.to_owned()),
                None => paragraphs.push(line.trim().to_owned()),
            }
            continue;
        }
        match line.split_once(':') {
            Some((title, "")) => {
                sections.push(Section { title: named(title), lines: Vec::new(), is_verbatim: true });
                is_open = true;
            }
            Some((title @ ("Example" | "Exit status"), text)) => {
                let lines = vec![text.trim().to_owned()];
                sections.push(Section { title: named(title), lines, is_verbatim: false });
                is_open = true;
            }
            // A section of one line may continue on the next ones.
            _ if line.is_empty() => is_open = false,
            _ => match sections.last_mut().filter(|section| is_open && !section.is_verbatim) {
                Some(section) => section.lines.push(line.to_owned()),
                None => paragraphs.push(line.to_owned()),
            },
        }
    }
    (sections, paragraphs)
}

/// Returns the title of a section as man-pages(7) names it.
fn named(title: &str) -> String {
    match title {
        "Example" | "Examples" | "A session" => "EXAMPLES".to_owned(),
        _ if title.starts_with("Environment") => "ENVIRONMENT".to_owned(),
        _ => title.to_uppercase(),
    }
}

fn lines(roff: &mut Roff, section: &Section) {
    if section.is_verbatim {
        roff.control("nf", []);
    }
    for line in &section.lines {
        roff.text([roman(line.as_str())]);
    }
    if section.is_verbatim {
        roff.control("fi", []);
    }
}

/// Writes lines `  NAME   text` as a list of names with their texts.
fn terms(roff: &mut Roff, section: &Section) {
    for line in &section.lines {
        match line.trim().split_once("  ") {
            Some((name, text)) => roff.control("TP", []).text([bold(name)]).text([roman(text.trim())]),
            None => roff.text([roman(line.trim())]),
        };
    }
}

/// Writes the names of related pages: all commands on the page of the program, else the program.
fn see_also(roff: &mut Roff, program: &Command, command: &Command) {
    let mut names: Vec<&str> = Vec::new();
    if command.get_name() == program.get_name() {
        let commands = program.get_subcommands().filter(|command| !command.is_hide_set());
        names.extend(commands.filter_map(Command::get_display_name));
    } else {
        names.push("kcm");
        names.extend(command.get_subcommands().filter_map(Command::get_display_name));
    }
    let mut words = Vec::new();
    for name in names {
        words.extend([bold(name), roman("(1), ")]);
    }
    words.extend([
        bold("kcm"),
        roman("(5), "),
        bold("taskset"),
        roman("(1), "),
        bold("cpuset"),
        roman("(7)"),
    ]);
    roff.text(words);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(title: &str, lines: &[&str], is_verbatim: bool) -> Section {
        let lines = lines.iter().map(|line| (*line).to_owned()).collect();
        Section { title: title.to_owned(), lines, is_verbatim }
    }

    #[test]
    fn the_text_after_a_help_becomes_sections() {
        let help =
            "Examples:\n  kcm x\n      more\nA paragraph.\n\nEnvironment:\n  A    b\n\nExit status: 0 or\n1.";
        let (sections, paragraphs) = split(help);
        assert_eq!(
            sections,
            [
                section("EXAMPLES", &["  kcm x", "      more"], true),
                section("ENVIRONMENT", &["  A    b"], true),
                section("EXIT STATUS", &["0 or", "1."], false),
            ]
        );
        assert_eq!(paragraphs, ["A paragraph."]);
    }

    #[test]
    fn every_page_has_all_sections_and_keeps_the_lines_of_examples() {
        for page in super::super::all().unwrap() {
            let text = String::from_utf8(page.text).unwrap();
            let file = page.file.display();
            let mut sections = vec!["NAME", "DESCRIPTION", "FILES", "ENVIRONMENT", "SEE ALSO"];
            if file.to_string().starts_with("man1/") {
                sections.extend(["SYNOPSIS", "OPTIONS", "EXIT STATUS"]);
            }
            for section in sections {
                let line = format!(".SH {section}").replace("EXIT STATUS", "\"EXIT STATUS\"");
                let line = line.replace("SEE ALSO", "\"SEE ALSO\"");
                assert_eq!(text.lines().filter(|other| *other == line).count(), 1, "{file}: {section}");
            }
            assert!(!text.contains(".SH EXTRA") && !text.contains("kcm\\-help"), "{file}");
            let examples = text.split_once("\n.SH EXAMPLES\n").map(|(_, rest)| rest);
            assert!(
                examples.is_none_or(|rest| rest.starts_with(".nf\n")),
                "{file}: examples are not refilled"
            );
        }
    }
}
