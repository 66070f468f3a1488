//! The queue: who is served first, what becomes one call, and what becomes of calls that fail, or never end.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::state::{Asked, Piece, State, Until};
use super::*;

const PAGE: u64 = 4096;

fn terms(threads: usize) -> Terms {
    let limit = Some(Duration::from_secs(10));
    Terms { name: "callback test".to_owned(), size: 256 * PAGE, threads, batch: 16 * PAGE, limit }
}

/// A queue's state, and the time that it is given.
struct Bench {
    terms: Terms,
    state: State,
    view: u64,
    now: Instant,
}

impl Bench {
    fn new(threads: usize) -> Self {
        let mut state = State::default();
        let view = state.open_view();
        state.takers = 2 * threads;
        Self { terms: terms(threads), state, view, now: Instant::now() }
    }

    fn ask(&mut self, page: u64, pages: u64, ahead: bool) -> u64 {
        let (offset, length) = (page * PAGE, pages * PAGE);
        let asked = Asked { view: self.view, offset, length, unit: PAGE, ahead };
        self.state.submit(asked, &self.terms, self.now).unwrap()
    }

    fn demand(&mut self, page: u64, pages: u64) -> u64 {
        self.ask(page, pages, false)
    }

    /// The next call, in pages.
    fn begin(&mut self) -> Option<(u64, u64, u64)> {
        let call = self.state.begin(&self.terms, self.now)?;
        Some((call.id, call.offset / PAGE, call.length / PAGE))
    }

    fn look(&mut self, request: u64) -> Until {
        self.state.look(request, &self.terms, self.now)
    }

    /// How a request ended: whether there are contents, and how many pages; or why not.
    fn outcome(&mut self, request: u64) -> Result<(bool, u64), String> {
        loop {
            match self.look(request) {
                Until::Done(Ok((piece, length))) => {
                    return Ok((matches!(piece, Piece::Bytes(..)), length / PAGE));
                }
                Until::Done(Err((reason, _))) => return Err(reason),
                Until::Again => {}
                Until::Called(_) | Until::CalledOr(..) => return Err("waits".to_owned()),
            }
        }
    }
}

#[test]
fn a_fault_goes_before_population_which_leaves_it_a_thread() {
    let mut bench = Bench::new(2);
    bench.ask(0, 4, true);
    bench.ask(100, 4, true);
    assert_eq!(bench.begin().map(|call| call.1), Some(0));
    assert_eq!(bench.begin(), None, "the second thread is for faults");
    bench.demand(200, 1);
    assert_eq!(bench.begin().map(|call| call.1), Some(200));
    assert_eq!(bench.begin(), None, "two at once");
}

#[test]
fn what_waits_and_lies_together_is_one_call_up_to_a_batch() {
    let mut bench = Bench::new(1);
    let requests = [8, 0, 4, 12, 16, 40].map(|page| bench.demand(page, 4));
    let (call, first, pages) = bench.begin().unwrap();
    assert_eq!((first, pages), (0, 16), "the oldest, with its neighbours on both sides");
    let contents = (0..16).flat_map(|page| [page; PAGE as usize]).collect();
    assert_eq!(bench.state.answer(call, Contents::Bytes(contents)), Ok(true));
    let Until::Done(Ok((Piece::Bytes(bytes, start), length))) = bench.look(requests[2]) else {
        panic!("it was answered")
    };
    assert_eq!((bytes[start], length), (4, 4 * PAGE));
    assert_eq!(bench.begin().map(|call| (call.1, call.2)), Some((16, 4)));
    assert_eq!(bench.outcome(requests[5]), Err("waits".to_owned()));
}

#[test]
fn a_page_that_is_on_its_way_is_not_asked_for_twice() {
    let mut bench = Bench::new(2);
    let first = bench.demand(0, 16);
    let (call, ..) = bench.begin().unwrap();
    let clone = bench.demand(12, 16);
    let ahead = bench.ask(0, 16, true);
    assert_eq!(
        bench.begin().map(|call| call.1),
        Some(0),
        "population does not hold a fault's call up, nor wait for it"
    );
    assert_eq!(bench.state.answer(call, Contents::Zero), Ok(true));
    assert_eq!(bench.outcome(first), Ok((false, 16)));
    assert_eq!(bench.outcome(clone), Ok((false, 4)), "as far as the call goes");
    assert_eq!(bench.outcome(ahead), Err("waits".to_owned()));
}

#[test]
fn of_a_call_that_fails_only_the_pages_fail_that_cannot_be_had_by_themselves() {
    let mut bench = Bench::new(1);
    let (good, bad) = (bench.demand(0, 4), bench.demand(4, 4));
    let (call, ..) = bench.begin().unwrap();
    assert!(bench.state.fail(call, "page 4 is bad"));
    let (call, first, pages) = bench.begin().unwrap();
    assert_eq!((first, pages), (0, 1), "the page that the fault is on");
    assert_eq!(bench.state.answer(call, Contents::Zero), Ok(true));
    assert_eq!(bench.outcome(good), Ok((false, 1)));
    let (call, first, pages) = bench.begin().unwrap();
    assert_eq!((first, pages), (4, 1));
    assert!(bench.state.fail(call, "page 4 is bad"));
    assert_eq!(bench.outcome(bad), Err("page 4 is bad".to_owned()));
}

#[test]
fn population_finds_the_page_that_fails_by_halves() {
    let mut bench = Bench::new(1);
    let request = bench.ask(0, 16, true);
    let mut asked = Vec::new();
    while let Some((call, _, pages)) = bench.begin() {
        asked.push(pages);
        if pages > 3 {
            bench.state.fail(call, "page 3 is bad");
        } else {
            bench.state.answer(call, Contents::Zero).unwrap();
        }
    }
    assert_eq!(asked, [16, 8, 4, 2]);
    assert_eq!(bench.outcome(request), Ok((false, 2)));
}

#[test]
fn an_answer_of_the_wrong_length_names_both_numbers_and_leaves_the_call_open() {
    let mut bench = Bench::new(1);
    let request = bench.demand(0, 1);
    let (call, ..) = bench.begin().unwrap();
    for returned in [0, PAGE - 1, PAGE + 1] {
        let wrong = bench.state.answer(call, Contents::Bytes(vec![1; returned as usize])).unwrap_err();
        assert_eq!(wrong, WrongLength { returned, asked: PAGE });
        assert_eq!(wrong.to_string(), format!("it returned {returned} bytes where 4096 were asked for"));
    }
    assert!(bench.state.fail(call, "wrong"));
    assert_eq!(bench.outcome(request), Err("wrong".to_owned()));
}

#[test]
fn a_call_past_its_limit_is_given_up_and_its_thread_not_counted_on() {
    let mut bench = Bench::new(1);
    let request = bench.demand(0, 1);
    let (hung, ..) = bench.begin().unwrap();
    assert_eq!(bench.outcome(request), Err("waits".to_owned()));
    let next = bench.demand(9, 1);
    assert_eq!(bench.begin(), None);
    bench.now += Duration::from_secs(10);
    assert!(bench.outcome(request).unwrap_err().contains("time limit of 10 s"));
    let (call, first, _) = bench.begin().expect("another thread stands in");
    assert_eq!(first, 9);
    assert_eq!(bench.state.answer(call, Contents::Zero), Ok(true));
    assert_eq!(bench.outcome(next), Ok((false, 1)));
    assert_eq!(bench.state.answer(hung, Contents::Zero), Ok(false), "it came too late");
}

#[test]
fn when_all_threads_hang_everyone_fails_at_once_until_one_comes_back() {
    let mut bench = Bench::new(1);
    let mut hung = Vec::new();
    for page in [0, 10] {
        let request = bench.demand(page, 1);
        hung.push(bench.begin().unwrap().0);
        bench.now += Duration::from_secs(10);
        if page == 10 {
            let waiting = bench.demand(20, 1);
            assert!(bench.outcome(request).unwrap_err().contains("time limit"));
            assert!(bench.outcome(waiting).unwrap_err().contains("all of its 2 threads hang"));
        } else {
            assert!(bench.outcome(request).unwrap_err().contains("time limit"));
        }
    }
    let asked = Asked { view: bench.view, offset: 0, length: PAGE, unit: PAGE, ahead: false };
    let refused = bench.state.submit(asked, &bench.terms, bench.now).unwrap_err();
    assert!(refused.contains("all of its 2 threads hang"), "{refused}");
    assert!(!bench.state.fail(hung[0], "late"));
    let request = bench.demand(0, 1);
    let (call, ..) = bench.begin().unwrap();
    assert_eq!(bench.state.answer(call, Contents::Zero), Ok(true));
    assert_eq!(bench.outcome(request), Ok((false, 1)));
}

#[test]
fn who_waits_is_let_go_when_his_pager_ends_and_others_wait_on() {
    let mut bench = Bench::new(1);
    let mine = bench.demand(0, 1);
    bench.begin().unwrap();
    let queued = bench.demand(50, 1);
    let view = std::mem::replace(&mut bench.view, bench.state.open_view());
    let other = bench.demand(60, 1);
    bench.state.close_view(view);
    for request in [mine, queued] {
        assert!(bench.outcome(request).unwrap_err().contains("has ended"));
    }
    assert_eq!(bench.begin().map(|call| call.1), Some(60), "the call that nobody waits for holds nobody up");
    assert_eq!(bench.outcome(other), Err("waits".to_owned()));
}

#[test]
fn threads_ask_and_answer_and_are_sent_home_at_the_end() {
    let queue = RequestQueue::new(terms(2));
    assert!(!queue.hire(), "nobody needs them yet");
    let source = queue.source();
    let mut takers = Vec::new();
    while queue.hire() {
        let queue = Arc::clone(&queue);
        takers.push(thread::spawn(move || {
            while let Some(call) = queue.take() {
                let pages = call.offset / PAGE..(call.offset + call.length) / PAGE;
                let bytes = pages.flat_map(|page| [page as u8; PAGE as usize]).collect();
                queue.answer(call.id, Contents::Bytes(bytes)).unwrap();
            }
        }));
    }
    assert_eq!(takers.len(), 4);
    thread::scope(|scope| {
        for first in 0..8 {
            let source = &source;
            scope.spawn(move || {
                let mut scratch = vec![0; 32 * PAGE as usize];
                for page in (first..256).step_by(8) {
                    let pages = (256 - page).min(20) as usize;
                    let answer = source.wait(page * PAGE, pages * PAGE as usize, PAGE as usize, &mut scratch);
                    let Ok(Answer::Bytes(bytes)) = answer else { panic!("{answer:?}") };
                    assert!(bytes.len() <= 16 * PAGE as usize && bytes.len() >= PAGE as usize);
                    for (at, bytes) in bytes.chunks(PAGE as usize).enumerate() {
                        assert!(bytes.iter().all(|byte| *byte == (page as usize + at) as u8));
                    }
                }
            });
        }
    });
    let mut scratch = vec![0; PAGE as usize];
    let beyond = source.wait(256 * PAGE, PAGE as usize, PAGE as usize, &mut scratch).unwrap_err();
    assert!(beyond.to_string().contains("callback test: the memory has 1048576 bytes"), "{beyond}");
    source.close();
    assert!(source.wait(0, PAGE as usize, PAGE as usize, &mut scratch).is_err());
    for taker in takers {
        taker.join().unwrap();
    }
}
