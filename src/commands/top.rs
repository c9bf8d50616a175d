//! `kcm top`: a live view of the CPUs: who has each one, since when, and who else runs there.
//!
//! Owns the choice between the screen, one frame as text, and the process that looks. Does not know what is measured, or how
//! it is drawn.
//!
//! A process that reads a mount may hang, in a way that not even SIGKILL ends. So another process looks (`look`), and this
//! one asks it (`common::looker`), shows what it answers (`terminal`, `view`, `screen`), and can end at any time.

mod look;
mod meter;
mod picture;
mod rows;
mod sample;
mod screen;
mod terminal;
mod view;

use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use anyhow::{Error, bail};
use kcm_mount::text;

use super::common::looker::{Heard, Looker};
use super::common::output::print;
use super::describe;
use crate::cli;
use sample::{Answer, Sample};
use view::View;

/// How long `--once` waits for a sample. To find out that a daemon does not answer takes half of that.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Shows the view until the user quits.
pub(super) fn run(args: &cli::Top) -> Result<ExitCode, Error> {
    if args.look {
        return look::run(args);
    }
    if args.once {
        return once(args);
    }
    let instead = "use kcm top --once, or kcm describe --format=map";
    if !io::stdout().is_terminal() {
        bail!("standard output is not a terminal; {instead}");
    }
    if std::env::var("TERM").is_ok_and(|term| term == "dumb") {
        bail!("TERM=dumb: this terminal cannot show the view; {instead}");
    }
    terminal::run(View::new(shown(&args.dir.conf_dir), args.interval), &args.dir.conf_dir)
}

/// Prints one frame as text. Shares need two samples.
fn once(args: &cli::Top) -> Result<ExitCode, Error> {
    let (sender, heard) = mpsc::channel();
    let mut looker = Looker::start(Stdio::inherit(), move |it| sender.send(it).is_ok())?;
    looker.ask()?;
    answer(&heard, &args.dir.conf_dir)?;
    std::thread::sleep(args.interval);
    looker.ask()?;
    let sample = answer(&heard, &args.dir.conf_dir)?;
    print(&table(&sample))?;
    Ok(ExitCode::SUCCESS)
}

fn answer(heard: &Receiver<Heard<Answer>>, conf_dir: &Path) -> Result<Box<Sample>, Error> {
    match heard.recv_timeout(ANSWER_TIMEOUT) {
        Ok(Heard::Answer(Answer::Sample(sample))) => Ok(sample),
        Ok(Heard::Answer(Answer::Error(error))) => bail!("{error}"),
        Ok(Heard::End) => bail!("the process that looks has ended; look at the limits of this user"),
        Err(_) => {
            bail!("{}: no answer for {} s; kcm status says why", conf_dir.display(), ANSWER_TIMEOUT.as_secs())
        }
    }
}

fn shown(path: &Path) -> String {
    text::one_line(&path.to_string_lossy()).into_owned()
}

/// Returns one line per CPU, in the machine's shape.
fn table(sample: &Sample) -> String {
    let [cpu, core, rest @ .., also] = rows::COLUMNS;
    let [pool, list, holder, held, share, others] = rest;
    let header = [cpu, core, "SOCKET", "NODE", pool, list, holder, held, share, others, "MARK", also];
    let mut view = View::new(String::new(), Duration::ZERO);
    view.update(sample);
    let or_none = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    let number = |number: Option<u32>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    let mut lines = vec![header.map(str::to_owned)];
    for row in view.machine().unwrap_or_default() {
        let (socket, node) = (number(row.cpu.socket), number(row.cpu.node));
        let [cpu, core, pool, list, holder, held, share, others, also] = row.cells.clone().map(or_none);
        let mark = or_none(row.marks.clone());
        lines.push([cpu, core, socket, node, pool, list, holder, held, share, others, mark, also]);
    }
    describe::columns(&lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_frame_as_text_has_every_cpu() {
        let expected = "\
CPU    CORE  SOCKET  NODE  POOL   LIST  HOLDER            HELD  SHARE  OTHERS  MARK  WHO ELSE
0      0     0       0     data   0,4   4711 (forwarder)  61 s  90%    10%     ~     ~4712 may run on 0-3, 91 (sh) 5%, 90 (kworker/0:1) 2%
4      0     0       0     data   0,4   4711 (forwarder)  61 s  60%    40%     ~     ~4712 may run on 0-3, 93 (moved) 100%
1      1     0       0     data   1     free              -     0%     31%     !     !4720 (stress) 31%
5      1     0       0     -      -     -                 -     -      -       -     -
2      2     1       1     infra  2-3   20 (sshd) +1      >2 h  20%    30%     -     -
6      2     1       1     -      -     -                 -     -      -       -     -
3      3     1       1     infra  2-3   20 (sshd) +1      >2 h  0%     0%      -     -
7 off  -     -       1     -      -     -                 -     -      -       -     -
";
        assert_eq!(table(&rows::tests::sample()), expected);
    }
}
