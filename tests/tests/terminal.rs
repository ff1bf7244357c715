//! A conversation at a terminal: what is typed, pasted and interrupted, in a pseudo-terminal that is bounded in time.
#![cfg(target_os = "linux")]

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use flashlm_tests::{chat_bundle, program, scratch};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Longest wait for anything: far beyond what it takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the program does when it asks for a line.
const ASKS: &str = "\u{1b}[?2004h";

/// A program in a pseudo-terminal of its own.
struct Terminal {
    child: Child,
    typed: File,
    shown: Receiver<Vec<u8>>,
    /// All that was shown, and how much of it was waited for.
    all: String,
    seen: usize,
}

impl Terminal {
    /// `flashlm run` of a bundle; the terminal is the one that Ctrl-C comes from.
    fn open(bundle: &Path, home: &Path, args: &[&str]) -> Self {
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(Some(&size), None).unwrap();
        let end = || Stdio::from(slave.try_clone().unwrap());
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait"]).arg(program("flashlm")).arg("run").arg(bundle).args(args);
        command.env("TERM", "xterm").env("HOME", home).env_remove("XDG_STATE_HOME");
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().expect("util-linux is there");
        drop(slave);
        let typed = File::from(master);
        let mut reader = typed.try_clone().unwrap();
        let (sender, shown) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // Reading fails when the program has ended.
            while let Ok(read @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..read].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { child, typed, shown, all: String::new(), seen: 0 }
    }

    /// Waits until `text` is shown, and gives what was shown until then.
    fn until(&mut self, text: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.all[self.seen..].find(text) {
                let begin = self.seen;
                self.seen += at + text.len();
                return self.all[begin..self.seen].to_owned();
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.shown.recv_timeout(left) {
                // What is cut within a character is of no interest here.
                Ok(more) => self.all += &String::from_utf8_lossy(&more),
                Err(_) => panic!("no {text:?} after:\n{}", self.all),
            }
        }
    }

    fn send(&mut self, keys: &str) {
        // As fast as the terminal takes it.
        self.typed.write_all(keys.as_bytes()).unwrap();
    }

    /// Types a line once there is somebody to read it, and gives what is shown until the next one is asked for.
    fn line(&mut self, line: &str) -> String {
        self.send(&format!("{line}\r"));
        let shown = self.until(ASKS);
        // The cursor is moved behind the prompt last.
        self.until("> ");
        plain(&shown)
    }

    /// The exit code, after everything was shown.
    fn end(mut self) -> (String, Option<i32>) {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait().unwrap() {
                while let Ok(more) = self.shown.recv_timeout(Duration::from_millis(200)) {
                    self.all += &String::from_utf8_lossy(&more);
                }
                return (plain(&self.all), status.code());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("it does not end:\n{}", self.all);
    }
}

/// A test that failed leaves no program behind.
impl Drop for Terminal {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            _ = kill(Pid::from_raw(children(self.child.id())), Signal::SIGKILL);
            _ = self.child.kill();
            _ = self.child.wait();
        }
    }
}

/// Text without what moves the cursor.
fn plain(text: &str) -> String {
    let mut out = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '\u{1b}' => _ = characters.by_ref().find(|c| c.is_ascii_alphabetic()),
            '\r' => {}
            other => out.push(other),
        }
    }
    out
}

/// Tokens that `/stats` says were read, and the size of the text.
fn stats(terminal: &mut Terminal) -> (usize, usize) {
    let said = terminal.line("/stats");
    let number = |before: &str, after: &str| {
        let begin = said.find(before).unwrap_or_else(|| panic!("{said}")) + before.len();
        said[begin..].split(after).next().unwrap().trim().parse().unwrap_or_else(|_| panic!("{said}"))
    };
    let line = said.lines().find(|line| line.contains(" read in ")).unwrap_or_else(|| panic!("{said}"));
    (line.trim().split(' ').next().unwrap().parse().unwrap(), number("context ", " of"))
}

#[test]
fn a_conversation_is_typed_pasted_kept_and_left() {
    let dir = scratch();
    let bundle = dir.path().join("m.flashlm");
    chat_bundle(&bundle);
    let home = dir.path().join("home");
    std::fs::create_dir(&home).unwrap();
    let file = dir.path().join("chat.kv");
    let mut terminal = Terminal::open(&bundle, &home, &["--context", "400", "-n", "20", "--ignore-eos"]);
    terminal.until("Type a message.");
    terminal.until(ASKS);
    terminal.until("> ");

    // A turn costs itself alone.
    terminal.line("Once upon a time there was a little girl who lived in a house");
    let (first, context) = stats(&mut terminal);
    assert!(first > 10 && context > first, "{first}, {context}");
    terminal.line("And?");
    let (second, more) = stats(&mut terminal);
    assert!(second < 18 && more > context, "{second} of {more}");

    // Ctrl-C gives up a line, twice as once, and says how to leave.
    terminal.send("not this\u{3}");
    assert!(plain(&terminal.until("leaves")).contains("not this"));
    terminal.until(ASKS);
    terminal.send("\u{3}");
    terminal.until("Ctrl-D or /quit leaves");
    terminal.until(ASKS);
    terminal.until("> ");
    assert_eq!(stats(&mut terminal), (second, more), "nothing was said");

    // Several lines that are pasted are one turn, as long as they are: 10 kB do not fit this context, and are counted whole.
    terminal.send("\u{1b}[200~Two\r\nlines\u{1b}[201~");
    terminal.until("lines");
    terminal.line("");
    let (pasted, _) = stats(&mut terminal);
    assert!((6..20).contains(&pasted), "{pasted}");
    let long: String = (0..500).map(|n| format!("line {n} of what is long\r")).collect();
    assert!(long.len() > 10_000);
    terminal.send(&format!("\u{1b}[200~{long}\u{1b}[201~"));
    terminal.until("line 499 of what is long");
    let refused = terminal.line("");
    let tokens: usize =
        refused.split(" tokens do not fit").next().unwrap().split_whitespace().last().unwrap().parse().unwrap();
    assert!(tokens > 3000, "{refused}");

    // Orders.
    assert!(terminal.line("/help").contains("/save FILE"));
    assert!(terminal.line("/nothing").contains("there is no /nothing"));
    assert!(terminal.line("/set tokens 8").contains("tokens 8"));
    assert!(terminal.line("/system Tell stories.").contains("from the next turn on"));
    terminal.line("Hello");
    let (_, before) = stats(&mut terminal);
    assert!(terminal.line(&format!("/save {}", file.display())).contains(&format!("saved {before} tokens")));
    assert!(terminal.line("/clear").contains("forgotten"));
    terminal.line("Hello");
    let (_, cleared) = stats(&mut terminal);
    assert!(cleared < before, "{cleared} of {before}");
    assert!(terminal.line(&format!("/load {}", file.display())).contains(&format!("goes on after {before} tokens")));
    terminal.line("And then?");
    let (read, _) = stats(&mut terminal);
    assert!(read < 18, "what was loaded is not computed again: {read}");
    assert!(terminal.line("/system").contains("Tell stories."), "it was saved, too");

    // The arrow brings a line back.
    terminal.send("\u{1b}[A");
    terminal.until("/system");
    terminal.send("\u{3}");
    terminal.until("leaves");
    terminal.until(ASKS);
    terminal.until("> ");

    // A full context is no end.
    let mut told = String::new();
    for turn in 0..16 {
        told += &terminal.line(&format!("Tell me about number {turn} and all that came before it"));
    }
    assert!(told.contains("were forgotten]"), "{told}");
    assert!(!told.contains("do not fit") && !told.contains("cut short"), "{told}");
    terminal.send("\u{4}");
    let (shown, code) = terminal.end();
    assert_eq!(code, Some(0), "{shown}");
    let history = std::fs::read_to_string(home.join(".local/state/flashlm/history")).unwrap();
    assert!(history.contains("/system Tell stories.") && history.contains("Two\\nlines"), "{history}");

    // The next one has the lines of this, unless nothing is to be kept.
    let mut terminal = Terminal::open(&bundle, &home, &["--no-history", "--session", file.to_str().unwrap()]);
    terminal.until("goes on after");
    terminal.until(ASKS);
    terminal.until("> ");
    // Typed ahead.
    terminal.send("/set tokens 3\rsecret\r/quit\r");
    let (shown, code) = terminal.end();
    assert!(code == Some(0) && shown.contains("saved"), "{shown}");
    assert_eq!(std::fs::read_to_string(home.join(".local/state/flashlm/history")).unwrap(), history);
}

#[test]
fn ctrl_c_ends_an_answer_and_a_signal_the_program() {
    let dir = scratch();
    let bundle = dir.path().join("m.flashlm");
    chat_bundle(&bundle);
    let mut terminal = Terminal::open(&bundle, dir.path(), &["--ignore-eos", "-n", "100000", "--no-history"]);
    terminal.until(ASKS);
    terminal.until("> ");
    terminal.send("Once upon a time\r");
    terminal.until("\u{1b}[?2004l");
    // Some of the answer.
    let begun = terminal.all.len();
    while terminal.all.len() < begun + 40 {
        terminal.until(" ");
    }
    terminal.send("\u{3}");
    terminal.until(ASKS);
    terminal.until("> ");
    let (_, context) = stats(&mut terminal);
    assert!(context > 8, "what was said stays: {context}");
    terminal.line("/set tokens 4");
    terminal.line("And then?");
    let (_, more) = stats(&mut terminal);
    assert!(more > context, "{more}");
    // A signal while a line is edited leaves the terminal as it was found.
    let found = echo(&terminal.typed);
    let program = children(terminal.child.id());
    kill(Pid::from_raw(program), Signal::SIGTERM).unwrap();
    terminal.until("\u{1b}[?2004l");
    let typed = terminal.typed.try_clone().unwrap();
    let (shown, code) = terminal.end();
    assert_eq!(code, Some(143), "{shown}");
    assert!(!found && echo(&typed), "keys are shown again");
}

/// Whether a terminal shows keys by itself.
fn echo(terminal: &File) -> bool {
    let set = nix::sys::termios::tcgetattr(terminal).unwrap();
    set.local_flags.contains(nix::sys::termios::LocalFlags::ECHO)
}

/// The program itself: `setsid` waits for it where it had to start another process, else it is it.
fn children(of: u32) -> i32 {
    let children = std::fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    children.split_whitespace().next().map_or(of as i32, |child| child.parse().unwrap())
}
