//! Every order in which two workers, the reaper and an owner who cancels, pauses and resumes can act on one job: an exhaustive search
//! over the real transitions. What the store adds to them, the lease and its fence, is modelled as `store/src/queue.rs` has it: each
//! of its calls is one transaction, so each is one step here.

#![expect(clippy::expect_used, reason = "a transition that is refused where it must not be is what these tests look for")]

use std::collections::{HashMap, HashSet, VecDeque};

use holdfast_domain::job::{JobError, JobState, Status};

/// Claims of one job that are looked at: more only repeat what fewer have shown.
const MOST_ATTEMPTS: i32 = 5;

/// What one worker believes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Worker {
    Idle,
    /// It works on a claim. Nobody has told it yet if that is no longer its.
    Works {
        attempt: i32,
        trains: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    status: Status,
    attempt: i32,
    files_checked: bool,
    /// The attempt that the lease row names. One that is over may still stand there until it is reaped.
    lease: Option<(i32, Expiry)>,
    setbacks: i32,
    workers: [Worker; 2],
    /// Models that were made.
    published: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Expiry {
    Ahead,
    Over,
}

impl World {
    fn state(&self) -> JobState {
        let attempt = self.attempt;
        match self.status {
            Status::ValidatingFiles => JobState::ValidatingFiles { attempt },
            Status::Queued => JobState::Queued { attempt },
            Status::Running => JobState::Running { attempt },
            Status::Pausing => JobState::Pausing { attempt },
            Status::Paused => JobState::Paused { attempt, files_checked: self.files_checked },
            Status::Succeeded => JobState::Succeeded { fine_tuned_model: "ft:m".into(), trained_tokens: 1 },
            Status::Failed => JobState::Failed { error: JobError::new("x", "y") },
            Status::Cancelled => JobState::Cancelled,
        }
    }

    /// Writes a state, as `write_state` does.
    fn become_(&mut self, next: &JobState) {
        assert!(!self.status.is_terminal(), "{:?} was followed by {:?}", self.status, next.status());
        self.status = next.status();
        match next {
            JobState::ValidatingFiles { attempt } => (self.attempt, self.files_checked) = (*attempt, false),
            JobState::Queued { attempt } | JobState::Running { attempt } | JobState::Pausing { attempt } => {
                (self.attempt, self.files_checked) = (*attempt, true);
            }
            JobState::Paused { attempt, files_checked } => (self.attempt, self.files_checked) = (*attempt, *files_checked),
            JobState::Succeeded { .. } | JobState::Failed { .. } | JobState::Cancelled => {}
        }
    }

    /// Whether a worker's write gets through.
    fn holds(&self, attempt: i32) -> bool {
        self.lease == Some((attempt, Expiry::Ahead)) && self.attempt == attempt && !self.status.is_terminal()
    }

    fn waits(&self) -> bool {
        matches!(self.status, Status::ValidatingFiles | Status::Queued) && self.lease.is_none()
    }

    /// Every world that one transaction, or time, can make of this one.
    fn next(&self) -> Vec<(&'static str, Self)> {
        let mut found = Vec::new();
        let mut add = |what, change: &dyn Fn(&mut Self)| {
            let mut world = self.clone();
            change(&mut world);
            found.push((what, world));
        };
        for worker in 0..self.workers.len() {
            match self.workers[worker] {
                Worker::Idle if self.waits() && self.attempt < MOST_ATTEMPTS => add("claim", &|w| {
                    let next = w.state().claim().expect("a job that waits can be claimed");
                    w.become_(&next);
                    w.lease = Some((w.attempt, Expiry::Ahead));
                    w.workers[worker] = Worker::Works { attempt: w.attempt, trains: next.status() == Status::Running };
                }),
                Worker::Idle => {}
                Worker::Works { attempt, trains } => {
                    // A worker that was killed, or that has learned that the job is not its any more.
                    add("worker gone", &|w| w.workers[worker] = Worker::Idle);
                    if !self.holds(attempt) {
                        // What it writes changes nothing: `Store::hold` refuses it, which `tests/service/queue.rs` shows.
                        continue;
                    }
                    let mut write = |what, change: &dyn Fn(&mut Self) -> JobState| {
                        add(what, &|w| {
                            let next = change(w);
                            w.become_(&next);
                            w.lease = None;
                            w.workers[worker] = Worker::Idle;
                        });
                    };
                    if trains {
                        write("publish", &|w| {
                            w.published += 1;
                            w.state().succeed("ft:m".into(), 1).expect("one who trains can finish")
                        });
                    } else {
                        write("accept files", &|w| {
                            w.setbacks = 0;
                            w.state().accept_files().expect("one who checks can accept")
                        });
                    }
                    write("fail", &|w| w.state().fail(JobError::new("x", "y")).expect("one who holds can fail"));
                    write("give back", &|w| w.state().give_back().expect("one who holds can give back"));
                    write("set back", &set_back);
                }
            }
        }
        if let Some((attempt, Expiry::Ahead)) = self.lease {
            add("lease runs out", &|w| w.lease = Some((attempt, Expiry::Over)));
        }
        if let Some((_, Expiry::Over)) = self.lease {
            add("reap", &|w| {
                let next = set_back(w);
                w.become_(&next);
                w.lease = None;
            });
        }
        if let Ok(next) = self.state().cancel() {
            add("cancel", &|w| {
                w.become_(&next);
                w.lease = None;
            });
        }
        if let Ok(next) = self.state().pause() {
            add("pause", &|w| {
                w.become_(&next);
                if next.status() != Status::Pausing {
                    w.lease = None;
                }
            });
        }
        if let Ok(next) = self.state().resume() {
            add("resume", &|w| w.become_(&next));
        }
        found
    }
}

fn set_back(world: &mut World) -> JobState {
    world.setbacks += 1;
    world.state().set_back(world.setbacks, JobError::new("x", "y")).expect("a job that is held can be set back")
}

/// All worlds, and from which each follows.
fn all_worlds() -> HashMap<World, Vec<(&'static str, World)>> {
    let new = World {
        status: JobState::NEW.status(),
        attempt: 0,
        files_checked: false,
        lease: None,
        setbacks: 0,
        workers: [Worker::Idle; 2],
        published: 0,
    };
    let mut seen = HashMap::new();
    let mut open = VecDeque::from([new]);
    while let Some(world) = open.pop_front() {
        if seen.contains_key(&world) {
            continue;
        }
        let next = world.next();
        open.extend(next.iter().map(|(_, world)| world.clone()));
        seen.insert(world, next);
    }
    seen
}

#[test]
fn no_order_of_events_publishes_twice_or_brings_an_ended_job_back() {
    let worlds = all_worlds();
    assert!(worlds.len() > 1_000, "only {} worlds were seen", worlds.len());
    for (world, next) in &worlds {
        assert_eq!(world.published, u8::from(world.status == Status::Succeeded), "{world:?}");
        for (what, after) in next {
            assert!(!world.status.is_terminal() || after.status == world.status, "{what}: {world:?} became {after:?}");
            assert!(after.attempt >= world.attempt, "{what}: the number of a claim was used again");
        }
    }
}

#[test]
fn no_two_workers_may_write_at_a_time() {
    for world in all_worlds().keys() {
        let holders =
            world.workers.iter().filter(|worker| matches!(worker, Worker::Works { attempt, .. } if world.holds(*attempt)));
        assert!(holders.count() <= 1, "{world:?}");
    }
}

#[test]
fn no_job_is_lost() {
    let worlds = all_worlds();
    // Backwards from the ends, over every step but an owner's word: none may need that to end, unless it is paused.
    let mut ends: HashSet<&World> = worlds.keys().filter(|world| world.status.is_terminal()).collect();
    loop {
        let before = ends.len();
        for (world, next) in &worlds {
            let by_itself =
                |what: &str| !matches!(what, "cancel" | "pause") && (what != "resume" || world.status == Status::Paused);
            if next.iter().any(|(what, after)| by_itself(what) && ends.contains(after)) {
                ends.insert(world);
            }
        }
        if ends.len() == before {
            break;
        }
    }
    for world in worlds.keys().filter(|world| world.attempt < MOST_ATTEMPTS) {
        assert!(ends.contains(world), "nothing leads from here to an end: {world:?}");
    }
}

#[test]
fn one_who_was_cancelled_is_told_and_one_who_is_to_pause_is_told() {
    for world in all_worlds().keys() {
        for worker in world.workers {
            let Worker::Works { attempt, .. } = worker else { continue };
            match world.status {
                // Its next heartbeat finds no lease.
                Status::Cancelled | Status::Paused => assert!(!world.holds(attempt), "{world:?}"),
                // Its next heartbeat reads the wish, unless the lease is over, which it is told as well.
                Status::Pausing if attempt == world.attempt => assert!(world.lease.is_some(), "{world:?}"),
                _ => {}
            }
        }
    }
}
