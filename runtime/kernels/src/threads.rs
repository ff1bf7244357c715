//! The kernels' own thread pool: short jobs, cut into numbered tasks, with the caller taking part.
//!
//! Workers look for work for a few tens of microseconds after the last job, then sleep. A job never waits for a worker
//! that has not joined it: a worker that wakes up late finds the job closed. It knows nothing of what the tasks do.
#![expect(
    unsafe_code,
    reason = "a job lives on its caller's stack; disjoint chunks of one slice go to several threads"
)]

use std::any::Any;
use std::cell::UnsafeCell;
use std::io;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle thread looks for work, or for the end of a job, before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

/// Tasks of its own after which the caller of [`Threads::run_beside`] looks beside.
const BESIDE_EVERY: usize = 8;

/// `State` packs, from the top: the number of the job (32 bits), whether it is open, how many workers are in it (31 bits).
const OPEN: u64 = 1 << 31;
const JOINED: u64 = OPEN - 1;
const JOB_SHIFT: u32 = 32;

type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

struct Job {
    task: *const Task<'static>,
    tasks: usize,
}

struct Shared {
    state: AtomicU64,
    job: UnsafeCell<Job>,
    next: AtomicUsize,
    /// Workers that sleep, or are about to.
    sleepers: AtomicUsize,
    /// Workers that have begun: what a thread allocates as it begins is allocated by then.
    started: AtomicUsize,
    stop: AtomicBool,
    lock: Mutex<Option<Box<dyn Any + Send>>>,
    work: Condvar,
    done: Condvar,
}

// SAFETY: `job` is written only while no worker is in a job and none can join (`run_indexed`), and read only by threads
// in the job; `state` orders the two. Its pointer refers to a `Sync` closure that outlives the job.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// A pool of `count` threads, of which one is the caller of [`Threads::run`].
pub struct Threads {
    shared: Arc<Shared>,
    /// Held by the caller whose job is running.
    busy: AtomicBool,
    workers: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Threads").field("count", &self.count()).finish()
    }
}

impl Threads {
    /// Starts `threads - 1` workers and waits until they run.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn new(threads: NonZeroUsize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(Job { task: &(|_: usize, _: usize| {}) as *const Task<'static>, tasks: 0 }),
            next: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            started: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            lock: Mutex::new(None),
            work: Condvar::new(),
            done: Condvar::new(),
        });
        let mut pool = Self { shared, busy: AtomicBool::new(false), workers: Vec::new() };
        for worker in 1..threads.get() {
            let shared = Arc::clone(&pool.shared);
            let name = format!("kernels-{worker}");
            // On failure `pool` is dropped, which ends the workers started so far.
            pool.workers.push(std::thread::Builder::new().name(name).spawn(move || shared.work(worker))?);
        }
        let mut guard = pool.shared.lock();
        while pool.shared.started.load(Ordering::SeqCst) < pool.workers.len() {
            guard = pool.shared.done.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        drop(guard);
        Ok(pool)
    }

    /// Threads that take part in a job, the caller included.
    pub fn count(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task` once with each of `0..tasks`, in any order on any thread, and returns when all calls have returned.
    ///
    /// Allocates nothing. If the pool is busy (a task of this pool calls `run`, or another thread does), the tasks run
    /// on the calling thread.
    ///
    /// # Panics
    /// If a task panics: with the first panic, after the tasks under way have ended. Tasks not begun are skipped.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.run_indexed(tasks, &|index, _| task(index));
    }

    /// As [`Threads::run`]; the caller also calls `beside` now and then: before its first task, and after every few. The other
    /// threads do not wait for that, so short work that only one thread can do costs little there.
    pub fn run_beside(&self, tasks: usize, beside: &mut dyn FnMut(), task: &(dyn Fn(usize) + Sync)) {
        self.run_with(tasks, &|index, _| task(index), beside);
    }

    /// As [`Threads::run`]; the second argument is the thread, below [`Threads::count`]. Within one call of
    /// `run_indexed`, no two tasks run at the same time with the same thread.
    pub(crate) fn run_indexed(&self, tasks: usize, task: &(dyn Fn(usize, usize) + Sync)) {
        self.run_with(tasks, task, &mut || {});
    }

    fn run_with(&self, tasks: usize, task: &(dyn Fn(usize, usize) + Sync), beside: &mut dyn FnMut()) {
        if tasks == 0 {
            return;
        }
        let alone = tasks == 1 || self.workers.is_empty();
        if alone || self.busy.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            for index in 0..tasks {
                if index % BESIDE_EVERY == 0 {
                    beside();
                }
                task(index, 0);
            }
            return;
        }
        let shared = &*self.shared;
        // SAFETY: this only forgets the lifetime. `run_job` returns after every worker that could hold the pointer has
        // left the job, also when a task panics.
        let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        shared.run_job(Job { task, tasks }, beside);
        let panic = shared.lock().take();
        self.busy.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Cuts `out` into chunks of `chunk` elements (the last may be shorter) and calls `task` once with each chunk's
    /// number and elements.
    ///
    /// # Panics
    /// If `chunk` is zero, or as [`Threads::run`].
    pub fn chunks_mut<T: Send>(&self, out: &mut [T], chunk: usize, task: &(dyn Fn(usize, &mut [T]) + Sync)) {
        self.chunks_mut_beside(out, chunk, &mut || {}, task);
    }

    /// As [`Threads::chunks_mut`], with `beside` as in [`Threads::run_beside`].
    pub(crate) fn chunks_mut_beside<T: Send>(
        &self,
        out: &mut [T],
        chunk: usize,
        beside: &mut dyn FnMut(),
        task: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        assert!(chunk > 0, "chunks of no elements");
        let len = out.len();
        let base = SendPtr(out.as_mut_ptr());
        self.run_beside(len.div_ceil(chunk), beside, &|index| {
            let start = index * chunk;
            // SAFETY: each index is given out once, so the chunks are disjoint parts of `out`, which is borrowed
            // mutably until `run` returns; `start < len` as `index` is below the rounded-up quotient.
            let part = unsafe { std::slice::from_raw_parts_mut(base.get().add(start), chunk.min(len - start)) };
            task(index, part);
        });
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.shared.lock());
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches its tasks' panics, so it has nothing to tell.
            let _ = worker.join();
        }
    }
}

/// A pointer that several threads use for disjoint parts of one slice.
pub(crate) struct SendPtr<T>(pub(crate) *mut T);

impl<T> SendPtr<T> {
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: whoever uses the pointer answers for disjointness; the elements themselves may go to another thread.
unsafe impl<T: Send> Sync for SendPtr<T> {}

impl Shared {
    /// A panic while the lock is held cannot leave its content half-written.
    fn lock(&self) -> MutexGuard<'_, Option<Box<dyn Any + Send>>> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The caller's side of a job. Only the holder of `busy` is here.
    fn run_job(&self, job: Job, beside: &mut dyn FnMut()) {
        let number = (self.state.load(Ordering::Relaxed) >> JOB_SHIFT) + 1;
        // SAFETY: the last job is closed and no worker is in it, so no thread reads `job` until `state` opens it below.
        unsafe { *self.job.get() = job };
        self.next.store(0, Ordering::Relaxed);
        self.state.store(number << JOB_SHIFT | OPEN, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            // A worker counts itself asleep under the lock, so once we have held it, it either waits or has seen the job.
            drop(self.lock());
            self.work.notify_all();
        }
        self.take_tasks(0, beside);
        let before = self.state.fetch_and(!OPEN, Ordering::AcqRel);
        if before & JOINED > 0 && !spin_until(|| self.state.load(Ordering::Acquire) & JOINED == 0) {
            let mut guard = self.lock();
            while self.state.load(Ordering::Acquire) & JOINED > 0 {
                guard = self.done.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// A worker's life.
    fn work(&self, worker: usize) {
        let guard = self.lock();
        self.started.fetch_add(1, Ordering::SeqCst);
        self.done.notify_one();
        drop(guard);
        let mut last = 0;
        loop {
            let is_new = |state: u64| state & OPEN > 0 && state >> JOB_SHIFT != last;
            let stopped = || self.stop.load(Ordering::SeqCst);
            if !spin_until(|| is_new(self.state.load(Ordering::Acquire)) || stopped()) {
                let mut guard = self.lock();
                self.sleepers.fetch_add(1, Ordering::SeqCst);
                while !is_new(self.state.load(Ordering::SeqCst)) && !stopped() {
                    guard = self.work.wait(guard).unwrap_or_else(PoisonError::into_inner);
                }
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
            }
            if stopped() {
                return;
            }
            let state = self.state.load(Ordering::Acquire);
            if !is_new(state) {
                continue;
            }
            // Joining succeeds only while this very job is open: the number is part of what is compared.
            if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            last = state >> JOB_SHIFT;
            self.take_tasks(worker, &mut || {});
            let left = self.state.fetch_sub(1, Ordering::AcqRel) - 1;
            if left & (OPEN | JOINED) == 0 {
                drop(self.lock());
                self.done.notify_one();
            }
        }
    }

    /// Runs tasks until none is left. The calling thread must be in the job.
    fn take_tasks(&self, thread: usize, beside: &mut dyn FnMut()) {
        // SAFETY: a thread in the job: `job` is not written before it has left, and its closure lives as long.
        let (task, tasks) = unsafe { (&*(*self.job.get()).task, (*self.job.get()).tasks) };
        let result = catch_unwind(AssertUnwindSafe(|| {
            for taken in 0.. {
                if taken % BESIDE_EVERY == 0 {
                    beside();
                }
                let index = self.next.fetch_add(1, Ordering::Relaxed);
                if index >= tasks {
                    break;
                }
                task(index, thread);
            }
        }));
        if let Err(panic) = result {
            // Far beyond any number of tasks, and far from wrapping around.
            self.next.store(usize::MAX / 2, Ordering::Relaxed);
            self.lock().get_or_insert(panic);
        }
    }
}

/// Looks at `ready` for a short while; whether it came true.
fn spin_until(ready: impl Fn() -> bool) -> bool {
    let mut deadline = None;
    loop {
        for _ in 0..32 {
            if ready() {
                return true;
            }
            std::hint::spin_loop();
        }
        let now = Instant::now();
        if now > *deadline.get_or_insert(now + SPIN) {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(threads: usize) -> Threads {
        Threads::new(NonZeroUsize::new(threads).unwrap()).unwrap()
    }

    #[test]
    fn the_caller_looks_beside_and_only_the_caller() {
        for threads in [1, 2, 5] {
            let pool = pool(threads);
            for tasks in [1, 7, 8, 9, 300] {
                let (caller, mut looks) = (std::thread::current().id(), 0);
                let done = AtomicUsize::new(0);
                let mut beside = || {
                    assert_eq!(std::thread::current().id(), caller);
                    looks += 1;
                };
                pool.run_beside(tasks, &mut beside, &|_| {
                    done.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(done.into_inner(), tasks);
                assert!((1..=tasks.div_ceil(BESIDE_EVERY) + 1).contains(&looks), "{looks} looks beside {tasks} tasks");
            }
        }
    }

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 7] {
            let pool = pool(threads);
            assert_eq!(pool.count(), threads);
            for round in 0..300 {
                let tasks = round % 41;
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
                if round % 50 == 0 {
                    // Long enough for the workers to fall asleep.
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }

    #[test]
    fn chunks_are_disjoint_and_complete() {
        let pool = pool(3);
        for len in 0..50 {
            for chunk in [1, 2, 7, 64] {
                let mut out = vec![0u32; len];
                pool.chunks_mut(&mut out, chunk, &|index, part| {
                    for (i, slot) in part.iter_mut().enumerate() {
                        *slot += (index * chunk + i) as u32 + 1;
                    }
                });
                assert!(out.iter().enumerate().all(|(i, &v)| v as usize == i + 1), "{len} in chunks of {chunk}");
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = pool(4);
        for bad in [0, 5, 99] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, &|i| {
                    if i == bad {
                        panic!("task {i}");
                    }
                });
            }));
            let message = result.unwrap_err();
            assert_eq!(message.downcast_ref::<String>().unwrap(), &format!("task {bad}"));
            let sum = AtomicUsize::new(0);
            pool.run(100, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn a_run_within_a_run_and_runs_from_many_threads_end() {
        let pool = pool(3);
        let sum = AtomicUsize::new(0);
        pool.run(4, &|_| {
            pool.run(5, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.load(Ordering::Relaxed), 40);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(3, &|_| {
                            sum.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 1240);
    }

    #[test]
    fn no_two_tasks_share_a_thread_number_at_once() {
        let pool = pool(4);
        let taken: Vec<AtomicBool> = (0..4).map(|_| AtomicBool::new(false)).collect();
        for _ in 0..50 {
            pool.run_indexed(64, &|_, thread| {
                assert!(!taken[thread].swap(true, Ordering::SeqCst));
                std::hint::black_box(thread);
                taken[thread].store(false, Ordering::SeqCst);
            });
        }
    }
}
