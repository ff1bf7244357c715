//! Reads with a pool of threads, one positional vectored read each. Works on every Unix.

#![expect(unsafe_code, reason = "reads into memory named by raw pointers")]

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crate::transport::{Finished, Operation, Transport, read_now};
use crate::{DirectFile, IoError};

const NAME: &str = "threads";

/// An operation on its way to a reader thread.
struct Job(Operation);

// SAFETY: `Transport::start` promises that the memory behind the pointers stays valid and untouched until the
// operation is reported as finished, on whichever thread it runs.
unsafe impl Send for Job {}

#[derive(Default)]
struct Inbox {
    jobs: VecDeque<Job>,
    closed: bool,
}

struct Shared {
    file: Arc<DirectFile>,
    inbox: Mutex<Inbox>,
    work: Condvar,
    outbox: Mutex<Vec<Finished>>,
    news: Condvar,
}

/// The thread pool.
pub(crate) struct ThreadTransport {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Operations started and not yet reaped.
    open: usize,
    /// Operations taken since the last flush.
    fresh: Vec<Operation>,
}

// SAFETY: as for `Job`: the pointers in `fresh` are only handed on.
unsafe impl Send for ThreadTransport {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while it holds one of these locks; were it to, the queues would still be whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ThreadTransport {
    pub(crate) fn new(file: Arc<DirectFile>, threads: usize, depth: usize) -> Result<Self, IoError> {
        let shared = Arc::new(Shared {
            file,
            inbox: Mutex::new(Inbox { jobs: VecDeque::with_capacity(depth), closed: false }),
            work: Condvar::new(),
            outbox: Mutex::new(Vec::with_capacity(depth)),
            news: Condvar::new(),
        });
        let mut transport =
            Self { shared, workers: Vec::with_capacity(threads), open: 0, fresh: Vec::with_capacity(depth) };
        for index in 0..threads {
            let shared = Arc::clone(&transport.shared);
            let worker =
                Builder::new().name(format!("flash-read-{index}")).stack_size(64 << 10).spawn(move || work(&shared));
            match worker {
                Ok(worker) => transport.workers.push(worker),
                // With fewer it is slower, and the engine's description tells how many there are.
                Err(source) if transport.workers.is_empty() => return Err(IoError::Thread { source }),
                Err(_) => break,
            }
        }
        Ok(transport)
    }
}

fn work(shared: &Shared) {
    loop {
        let mut inbox = lock(&shared.inbox);
        let Job(operation) = loop {
            if let Some(job) = inbox.jobs.pop_front() {
                break job;
            }
            if inbox.closed {
                return;
            }
            inbox = shared.work.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        };
        drop(inbox);
        // SAFETY: as for `Job`: nobody touches the memory before the operation is reported, which happens after.
        let result = unsafe { read_now(&shared.file, operation) };
        lock(&shared.outbox).push(Finished { id: operation.id, result });
        shared.news.notify_one();
    }
}

impl Transport for ThreadTransport {
    fn name(&self) -> &'static str {
        NAME
    }

    fn describe(&self) -> String {
        format!("{} reader threads", self.workers.len())
    }

    unsafe fn start(&mut self, operation: Operation) {
        self.fresh.push(operation);
        self.open += 1;
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.fresh.is_empty() {
            return Ok(());
        }
        let count = self.fresh.len();
        lock(&self.shared.inbox).jobs.extend(self.fresh.drain(..).map(Job));
        for _ in 0..count.min(self.workers.len()) {
            self.shared.work.notify_one();
        }
        Ok(())
    }

    fn reap(&mut self, at_least: usize, timeout: Duration, done: &mut Vec<Finished>) -> io::Result<()> {
        self.flush()?;
        let at_least = at_least.min(self.open);
        let start = Instant::now();
        let mut outbox = lock(&self.shared.outbox);
        while outbox.len() < at_least {
            let Some(left) = timeout.checked_sub(start.elapsed()) else { break };
            (outbox, _) = self.shared.news.wait_timeout(outbox, left).unwrap_or_else(PoisonError::into_inner);
        }
        self.open -= outbox.len();
        done.append(&mut outbox);
        Ok(())
    }

    fn cancel(&mut self) {
        // Not yet begun: report them as cancelled. A read already in the kernel cannot be recalled.
        let _ = self.flush();
        let mut inbox = lock(&self.shared.inbox);
        let mut outbox = lock(&self.shared.outbox);
        let cancelled = -rustix::io::Errno::CANCELED.raw_os_error();
        outbox.extend(inbox.jobs.drain(..).map(|Job(op)| Finished { id: op.id, result: cancelled }));
    }
}

impl Drop for ThreadTransport {
    fn drop(&mut self) {
        lock(&self.shared.inbox).closed = true;
        self.shared.work.notify_all();
        // With reads still open (a disk that hangs) waiting could take forever: the threads then end by themselves,
        // and whoever started those reads keeps their memory mapped.
        if self.open == 0 {
            for worker in self.workers.drain(..) {
                let _ = worker.join();
            }
        }
    }
}
