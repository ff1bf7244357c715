//! A small Hugging Face hub on loopback: two hosts, redirects as the real one makes them, and ways to misbehave.
//!
//! Small files are sent on within the hub, by a relative `Location`; large ones to another host, by an absolute one, behind
//! headers that say their SHA-256 and length. Every request is written down. Everything has a limit in time.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ring::digest::{SHA256, digest};

/// The only model.
pub const MODEL: &str = "some-org/tiny";
/// Its only commit.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Files from this length on lie with the other host.
const LARGE: usize = 1_000_000;
/// A connection that does nothing for so long is given up.
const PATIENCE: Duration = Duration::from_secs(20);

/// What was asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Whether the other host was asked, where the large files are.
    pub of_store: bool,
    /// `GET` or `HEAD`.
    pub method: String,
    /// With the query.
    pub path: String,
    /// The header `Range`.
    pub range: Option<String>,
    /// The header `Authorization`.
    pub authorization: Option<String>,
    /// Bytes of the body that were sent.
    pub sent: usize,
}

/// How the hub behaves.
#[derive(Clone, Default)]
pub struct Behaviour {
    /// Only for those who send this token.
    pub token: Option<&'static str>,
    /// The next so many large answers end after this many bytes; where it is true, the connection stays open, silent.
    pub cuts: Vec<(usize, bool)>,
    /// Large answers have a wrong byte.
    pub damaged: bool,
    /// `Range` is ignored.
    pub no_ranges: bool,
    /// Large files are sent in one more redirect, back to the hub first and by a relative path.
    pub detour: bool,
    /// The model is shown to everybody, its files to those who send this token, as the real hub does with gated models.
    pub gated: Option<&'static str>,
    /// Answers to the next requests of the hub or of the other host (where it is true): a status, and what `Retry-After` says.
    pub busy: Vec<(bool, &'static str, Option<u64>)>,
    /// Requests with a `Range` are answered with status 416.
    pub unsatisfiable: bool,
    /// Answers to requests whose path holds this are sent byte by byte, with a pause after each.
    pub drip: Option<(&'static str, Duration)>,
    /// Everything lies under this path, as with some mirrors; begins with a slash.
    pub prefix: &'static str,
}

struct Shared {
    files: BTreeMap<String, Vec<u8>>,
    store: String,
    behaviour: Mutex<Behaviour>,
    log: Mutex<Vec<Request>>,
    stop: AtomicBool,
}

/// A running hub; ends when it is dropped.
pub struct Hub {
    /// For `HF_ENDPOINT`.
    pub endpoint: String,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The name of a large file in caches.
pub fn hex_sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

impl Hub {
    /// A hub with one model of these files.
    pub fn start(files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        let hub = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
        // Another address: another host.
        let store = TcpListener::bind("127.0.0.2:0").expect("loopback is there");
        let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().expect("it is bound"));
        let shared = Arc::new(Shared {
            files: files.into_iter().collect(),
            store: address(&store),
            behaviour: Mutex::default(),
            log: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let endpoint = address(&hub);
        let threads = [(hub, false), (store, true)].map(|(listener, of_store)| {
            let shared = shared.clone();
            listener.set_nonblocking(true).expect("sockets can be asked");
            std::thread::spawn(move || accept(&listener, of_store, &shared))
        });
        Self { endpoint, shared, threads: threads.into() }
    }

    /// How it behaves from now on.
    pub fn behave(&self, behaviour: Behaviour) {
        *locked(&self.shared.behaviour) = behaviour;
    }

    /// What was asked since this was last called.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut *locked(&self.shared.log))
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            _ = thread.join();
        }
    }
}

fn accept(listener: &TcpListener, of_store: bool, shared: &Arc<Shared>) {
    while !shared.stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => {
                let shared = shared.clone();
                std::thread::spawn(move || answer(&stream, of_store, &shared));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn answer(stream: &TcpStream, of_store: bool, shared: &Shared) -> Option<()> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.set_write_timeout(Some(PATIENCE)).ok()?;
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut request = Request { of_store, method, path, range: None, authorization: None, sent: 0 };
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':')?;
        match name.to_ascii_lowercase().as_str() {
            "range" => request.range = Some(value.trim().to_owned()),
            "authorization" => request.authorization = Some(value.trim().to_owned()),
            _ => {}
        }
    }
    let busy = {
        let busy = &mut locked(&shared.behaviour).busy;
        let next = busy.iter().position(|(store, ..)| *store == of_store);
        next.filter(|_| request.method == "GET" || !of_store).map(|at| busy.remove(at))
    };
    let behaviour = locked(&shared.behaviour).clone();
    let reply = if let Some((_, status, after)) = busy {
        let headers = after.map(|seconds| ("Retry-After", seconds.to_string())).into_iter().collect();
        Reply { status, headers, ..Reply::default() }
    } else if of_store {
        stored(&request, shared, &behaviour)
    } else {
        hub(&request, shared, &behaviour)
    };
    let mut head =
        format!("HTTP/1.1 {}\r\nConnection: close\r\nContent-Length: {}\r\n", reply.status, reply.body.len());
    reply.headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
    let mut body = if request.method == "HEAD" { &[][..] } else { &reply.body };
    let mut is_stalling = false;
    if of_store && !body.is_empty() {
        let cuts = &mut locked(&shared.behaviour).cuts;
        if !cuts.is_empty() {
            let (bytes, stall) = cuts.remove(0);
            body = &body[..bytes.min(body.len())];
            is_stalling = stall;
        }
    }
    request.sent = body.len();
    let path_asked = request.path.clone();
    locked(&shared.log).push(request);
    let mut stream = stream;
    stream.write_all((head + "\r\n").as_bytes()).ok()?;
    match behaviour.drip.filter(|(path, _)| path_asked.contains(path)) {
        None => stream.write_all(body).ok()?,
        Some((_, pause)) => {
            for byte in body.chunks(1).take_while(|_| !shared.stop.load(Ordering::Relaxed)) {
                stream.write_all(byte).ok()?;
                std::thread::sleep(pause);
            }
        }
    }
    let begin = Instant::now();
    while is_stalling && begin.elapsed() < PATIENCE && !shared.stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(10));
    }
    Some(())
}

#[derive(Default)]
struct Reply {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

fn refusal(status: &'static str, code: &str) -> Reply {
    Reply { status, headers: vec![("X-Error-Code", code.to_owned())], body: b"{}".to_vec() }
}

fn hub(request: &Request, shared: &Shared, behaviour: &Behaviour) -> Reply {
    let prefix = behaviour.prefix;
    let Some(path) = request.path.strip_prefix(prefix) else { return refusal("404 Not Found", "RepoNotFound") };
    if let Some(token) = behaviour.token
        && request.authorization != Some(format!("Bearer {token}"))
    {
        return refusal("401 Unauthorized", "GatedRepo");
    }
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{MODEL}/revision/")) {
        if !["main", "refs%2Fpr%2F1", COMMIT].contains(&revision) {
            return refusal("404 Not Found", "RevisionNotFound");
        }
        let names = shared.files.keys().map(|name| serde_json::json!({ "rfilename": name }));
        let info = serde_json::json!({ "sha": COMMIT, "siblings": names.collect::<Vec<_>>() });
        return Reply { status: "200 OK", body: info.to_string().into_bytes(), ..Reply::default() };
    }
    let commit = || ("X-Repo-Commit", COMMIT.to_owned());
    if let Some(name) = path.strip_prefix(&format!("/{MODEL}/resolve/{COMMIT}/")) {
        let Some(content) = shared.files.get(name) else { return refusal("404 Not Found", "EntryNotFound") };
        match (&request.authorization, behaviour.gated) {
            (None, Some(_)) => return refusal("401 Unauthorized", "GatedRepo"),
            (Some(sent), Some(token)) if *sent != format!("Bearer {token}") => {
                return refusal("403 Forbidden", "GatedRepo");
            }
            _ => {}
        }
        if content.len() < LARGE {
            let location = ("Location", format!("{prefix}/api/resolve-cache/models/{MODEL}/{COMMIT}/{name}"));
            return Reply {
                status: "307 Temporary Redirect",
                headers: vec![location, commit()],
                body: b"moved".to_vec(),
            };
        }
        let sha256 = hex_sha256(content);
        let target = if behaviour.detour { format!("{prefix}/detour/") } else { format!("{}/", shared.store) };
        let headers = vec![
            ("Location", format!("{target}{sha256}?signature=secret")),
            ("X-Linked-ETag", format!("\"{sha256}\"")),
            ("X-Linked-Size", content.len().to_string()),
            commit(),
        ];
        return Reply { status: "302 Found", headers, body: b"elsewhere".to_vec() };
    }
    if let Some(name) = path.strip_prefix(&format!("/api/resolve-cache/models/{MODEL}/{COMMIT}/")) {
        let Some(content) = shared.files.get(name) else { return refusal("404 Not Found", "EntryNotFound") };
        let etag = format!("\"{}\"", &hex_sha256(content)[..40]);
        return Reply { status: "200 OK", headers: vec![("ETag", etag), commit()], body: content.clone() };
    }
    if let Some(rest) = path.strip_prefix("/detour/") {
        let location = ("Location", format!("{}/{rest}", shared.store));
        return Reply { status: "302 Found", headers: vec![location], ..Reply::default() };
    }
    // Who sends no token might see more with one.
    refusal(if request.authorization.is_some() { "404 Not Found" } else { "401 Unauthorized" }, "RepoNotFound")
}

/// The other host: large files by their hash, for whoever has the signature.
fn stored(request: &Request, shared: &Shared, behaviour: &Behaviour) -> Reply {
    let Some(hash) = request.path.strip_prefix('/').and_then(|p| p.strip_suffix("?signature=secret")) else {
        return Reply { status: "403 Forbidden", ..Reply::default() };
    };
    let Some(content) = shared.files.values().find(|content| content.len() >= LARGE && hex_sha256(content) == hash)
    else {
        return Reply { status: "404 Not Found", ..Reply::default() };
    };
    let mut content = content.clone();
    if behaviour.damaged {
        let middle = content.len() / 2;
        content[middle] ^= 1;
    }
    // `bytes=5-` or `bytes=5-9`.
    let asked = request.range.as_ref().and_then(|r| r.strip_prefix("bytes=")?.split_once('-'));
    let from = asked.and_then(|(from, _)| from.parse::<usize>().ok());
    if let Some(to) = asked.and_then(|(_, to)| to.parse::<usize>().ok()).filter(|_| !behaviour.no_ranges) {
        let whole = content.len();
        content.truncate(to + 1);
        let range = format!("bytes {}-{}/{whole}", from.unwrap_or(0), content.len() - 1);
        let body = content.split_off(from.unwrap_or(0).min(content.len()));
        return Reply { status: "206 Partial Content", headers: vec![("Content-Range", range)], body };
    }
    match from.filter(|_| !behaviour.no_ranges) {
        Some(_) if behaviour.unsatisfiable => Reply { status: "416 Range Not Satisfiable", ..Reply::default() },
        Some(from) if from >= content.len() => Reply { status: "416 Range Not Satisfiable", ..Reply::default() },
        Some(from) => {
            let range = format!("bytes {from}-{}/{}", content.len() - 1, content.len());
            let body = content.split_off(from);
            Reply { status: "206 Partial Content", headers: vec![("Content-Range", range)], body }
        }
        None => Reply { status: "200 OK", headers: vec![], body: content },
    }
}
