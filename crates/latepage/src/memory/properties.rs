//! Property tests: the page table against a plain model, the layout against look-ups that try every region, and the docs' table
//! against the code's.

use proptest::prelude::*;

use super::{Claim, Layout, LayoutError, PageSize, PageState, Pages, Region, Step};

mod the_page_table {
    use super::*;
    use PageState::*;

    /// What a step makes of a page, written down a second time, as rules instead of a table.
    fn model(step: Step, state: PageState) -> PageState {
        match (step, state) {
            (_, Failed) => Failed,
            (Step::Remove, _) => Removed,
            (Step::Fail, Present) => Present,
            (Step::Fail, _) => Failed,
            (Step::Claim | Step::ClaimAbsent, Absent) => InFlight,
            (Step::Claim, Removed) => Clearing,
            (Step::Filled, InFlight) => Filled,
            (Step::Settle, InFlight | Filled | Clearing) => Present,
            (Step::Abandon, InFlight) => Absent,
            (Step::Abandon, Clearing) => Removed,
            (_, unmoved) => unmoved,
        }
    }

    /// Every state that some steps of `allowed` can lead to from `state`.
    fn reachable(state: PageState, allowed: &[Step]) -> Vec<PageState> {
        let mut found = vec![state];
        let mut at = 0;
        while at < found.len() {
            let next = allowed.iter().filter_map(|step| step.from(found[at]));
            for state in next.collect::<Vec<_>>() {
                if !found.contains(&state) {
                    found.push(state);
                }
            }
            at += 1;
        }
        found
    }

    #[test]
    fn a_removed_page_is_never_the_sources_again() {
        let states = reachable(Removed, &Step::ALL);
        for source in [Absent, InFlight, Filled] {
            assert!(!states.contains(&source), "removed leads to {source}");
        }
    }

    #[test]
    fn a_filled_page_is_only_exposed_or_removed() {
        // Removed, it is never filled again either: see above.
        let but_removal: Vec<Step> = Step::ALL.into_iter().filter(|step| *step != Step::Remove).collect();
        assert_eq!(reachable(Filled, &but_removal), [Filled, Present, Failed]);
    }

    #[test]
    fn a_page_that_the_guest_has_is_only_ever_removed() {
        for step in Step::ALL {
            let next = (step == Step::Remove).then_some(Removed);
            assert_eq!(step.from(Present), next, "{}", step.name());
        }
    }

    #[test]
    fn a_failed_page_stays_failed() {
        assert_eq!(reachable(Failed, &Step::ALL), [Failed]);
    }

    #[test]
    fn every_step_and_state_is_named_by_its_number() {
        for (number, step) in Step::ALL.into_iter().enumerate() {
            assert_eq!(step as usize, number);
            assert!(step.from(step.usual()).is_some(), "{} moves no usual page", step.name());
        }
        for (number, state) in PageState::ALL.into_iter().enumerate() {
            assert_eq!(state as usize, number);
            assert_eq!(PageState::of(number as u8), state);
        }
    }

    #[test]
    fn the_docs_print_the_table_that_the_code_follows() {
        let row = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let line = |head: &str, cell: &dyn Fn(PageState) -> String| {
            let cells = PageState::ALL.into_iter().map(cell);
            row(std::iter::once(head.to_owned()).chain(cells).collect())
        };
        let mut table = line("a page that is", &|state| state.name().to_owned());
        table += "|---|---|---|---|---|---|---|---|\n";
        for step in Step::ALL {
            table += &line(&format!("`{}`", step.name()), &|state| {
                step.from(state).map_or("·", PageState::name).to_owned()
            });
        }
        table += &line("`claim` answers", &|state| format!("`{:?}`", Claim::found(state)));
        let docs = include_str!("../../../../docs/pages.md");
        assert!(docs.contains(&table), "docs/pages.md should have\n{table}");
    }

    #[test]
    fn a_new_table_lacks_every_page() {
        let pages = Pages::new(1000);
        assert_eq!(pages.count(), [1000, 0, 0, 0, 0, 0, 0]);
        assert_eq!(pages.lacking(), 1000);
        assert_eq!(pages.absent_run(0, u32::MAX, u32::MAX), 0..1000);
        assert!(Pages::new(0).is_empty());
    }

    const PAGES: u32 = 12;

    fn any_step() -> impl Strategy<Value = Step> {
        prop::sample::select(&Step::ALL[..])
    }

    proptest! {
        #[test]
        fn it_does_what_the_model_does(
            steps in prop::collection::vec((any_step(), 0..PAGES), 0..200),
        ) {
            let pages = Pages::new(PAGES);
            let mut states = vec![Absent; PAGES as usize];
            for (step, page) in steps {
                let before = states[page as usize];
                let after = model(step, before);
                let moved = before != after;
                match step {
                    Step::Claim => prop_assert_eq!(pages.claim(page), Claim::found(before)),
                    Step::ClaimAbsent => prop_assert_eq!(pages.claim_absent(page), moved),
                    Step::Filled => prop_assert_eq!(pages.filled(page), moved),
                    Step::Settle => prop_assert_eq!(pages.settle(page), moved),
                    Step::Abandon => prop_assert_eq!(pages.abandon(page), moved),
                    Step::Remove => prop_assert_eq!(pages.remove(page), before),
                    Step::Fail => prop_assert_eq!(pages.fail(page), before),
                }
                states[page as usize] = after;
                prop_assert_eq!(pages.state(page), after);
            }
            for state in PageState::ALL {
                let count = states.iter().filter(|other| **other == state).count();
                prop_assert_eq!(pages.count()[state as usize], count as u64);
            }
            let lacking = states.iter().filter(|state| state.is_lacking()).count();
            prop_assert_eq!(pages.lacking(), lacking as u64);
        }

        #[test]
        fn the_next_absent_run_is_the_one_that_a_walk_finds(
            taken in prop::collection::vec(any::<bool>(), 0..40),
            from in 0..45_u32,
            limit in 0..45_u32,
            most in 1..45_u32,
        ) {
            let pages = Pages::new(taken.len() as u32);
            for (page, _) in taken.iter().enumerate().filter(|(_, taken)| **taken) {
                pages.claim(page as u32);
            }
            let run = pages.absent_run(from, limit, most);
            let end = limit.min(pages.len());
            let absent = |page: &u32| !taken[*page as usize];
            match (from..end).find(absent) {
                None => prop_assert!(run.is_empty()),
                Some(first) => {
                    let after = (first..end).find(|page| !absent(page)).unwrap_or(end);
                    prop_assert_eq!(run, first..after.min(first + most));
                }
            }
        }
    }
}

mod a_layout {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn region(hva: u64, size: u64, offset: u64) -> Region {
        Region { gpa: None, hva, size, offset, page_size: PageSize::Small }
    }

    /// Regions that do not overlap anywhere, in an order of their own in every space, with gaps and without.
    fn regions() -> impl Strategy<Value = Vec<Region>> {
        let one = (any::<bool>(), any::<bool>(), 1..5_u64, [0..3_u64, 0..3, 0..3], any::<[u32; 3]>());
        prop::collection::vec(one, 1..7).prop_map(|drawn| {
            let mut regions: Vec<Region> = drawn
                .iter()
                .map(|(huge, has_gpa, pages, ..)| {
                    let page_size = PageSize::ALL[usize::from(*huge)];
                    Region {
                        gpa: has_gpa.then_some(0),
                        size: pages * page_size.bytes(),
                        page_size,
                        ..region(0, 0, 0)
                    }
                })
                .collect();
            for space in 0..3 {
                let mut order: Vec<usize> = (0..regions.len()).collect();
                order.sort_by_key(|index| drawn[*index].4[space]);
                let mut next = 0;
                for index in order {
                    let region = &mut regions[index];
                    let start = u64::next_multiple_of(next, region.page_size.bytes())
                        + drawn[index].3[space] * region.page_size.bytes();
                    match space {
                        0 => region.hva = start,
                        1 => region.offset = start,
                        _ => region.gpa = region.gpa.map(|_| start),
                    }
                    next = start + region.size;
                }
            }
            regions
        })
    }

    /// Every page's place, region after region: what the numbering promises, without a look-up.
    fn every_page(regions: &[Region]) -> Vec<(usize, Region)> {
        let pages_of = |(index, region): (usize, &Region)| {
            let (region, step) = (*region, region.page_size.bytes());
            (0..region.size / step).map(move |n| {
                let page = Region {
                    hva: region.hva + n * step,
                    gpa: region.gpa.map(|gpa| gpa + n * step),
                    offset: region.offset + n * step,
                    size: step,
                    ..region
                };
                (index, page)
            })
        };
        regions.iter().enumerate().flat_map(pages_of).collect()
    }

    /// The page whose range holds the address, by trying each.
    fn naive(pages: &[(usize, Region)], start: impl Fn(&Region) -> Option<u64>, at: u64) -> Option<u32> {
        pages
            .iter()
            .position(|(_, page)| start(page).is_some_and(|start| (start..start + page.size).contains(&at)))
            .map(|page| page as u32)
    }

    proptest! {
        #[test]
        fn finds_the_page_that_a_search_of_all_pages_finds(
            regions in regions(),
            anywhere in prop::collection::vec(0..40 * MIB, 20),
        ) {
            let layout = Layout::new(regions.clone()).unwrap();
            let pages = every_page(&regions);
            prop_assert_eq!(layout.pages() as usize, pages.len());
            let edges = pages.iter().flat_map(|(_, page)| {
                [page.hva, page.offset, page.gpa.unwrap_or(0)]
                    .map(|start| [start.saturating_sub(1), start, start + page.size - 1, start + page.size])
            });
            for at in edges.flatten().chain(anywhere) {
                prop_assert_eq!(layout.find_hva(at), naive(&pages, |page| Some(page.hva), at));
                prop_assert_eq!(layout.find_gpa(at), naive(&pages, |page| page.gpa, at));
                prop_assert_eq!(layout.find_offset(at), naive(&pages, |page| Some(page.offset), at));
            }
        }

        #[test]
        fn places_every_page_where_its_region_says(regions in regions()) {
            let layout = Layout::new(regions.clone()).unwrap();
            let pages = every_page(&regions);
            for (number, (index, page)) in pages.iter().enumerate() {
                let number = number as u32;
                let place = layout.place(number);
                prop_assert_eq!(place.region, *index);
                prop_assert_eq!(
                    (place.hva, place.gpa, place.offset, place.page_size),
                    (page.hva, page.gpa, page.offset, page.page_size)
                );
                let last = pages.iter().rposition(|(other, _)| other == index).unwrap();
                prop_assert_eq!(layout.region_end(number) as usize, last + 1);
                prop_assert!(layout.region_pages(*index).contains(&number));
            }
            prop_assert_eq!(layout.bytes(), regions.iter().map(|region| region.size).sum::<u64>());
            let end = regions.iter().map(|region| region.offset + region.size).max();
            prop_assert_eq!(Some(layout.end()), end);
        }

        #[test]
        fn a_removal_covers_the_pages_that_lie_wholly_in_it(
            regions in regions(),
            start in 0..40 * MIB,
            length in 0..40 * MIB,
            aligned in any::<bool>(),
        ) {
            let mask = if aligned { !4095 } else { !0 };
            let (start, end) = (start & mask, (start + length) & mask);
            let layout = Layout::new(regions.clone()).unwrap();
            let mut covered: Vec<u32> = layout.pages_in_hva(start, end).flatten().collect();
            covered.sort_unstable();
            let expected: Vec<u32> = (0_u32..)
                .zip(every_page(&regions))
                .filter(|(_, (_, page))| start <= page.hva && page.hva + page.size <= end)
                .map(|(number, _)| number)
                .collect();
            prop_assert_eq!(covered, expected);
        }

        #[test]
        fn refuses_exactly_the_regions_that_overlap(
            starts in prop::collection::vec((0..12_u64, 1..4_u64, 0..12_u64, prop::option::of(0..12_u64)), 1..5),
        ) {
            let regions: Vec<Region> = starts
                .iter()
                .map(|(hva, pages, offset, gpa)| Region {
                    gpa: gpa.map(|gpa| gpa * 4096),
                    ..region(hva * 4096, pages * 4096, offset * 4096)
                })
                .collect();
            let share = |a: u64, a_size: u64, b: u64, b_size: u64| a < b + b_size && b < a + a_size;
            let overlap = |a: &Region, b: &Region| {
                share(a.hva, a.size, b.hva, b.size)
                    || share(a.offset, a.size, b.offset, b.size)
                    || a.gpa.zip(b.gpa).is_some_and(|(first, second)| share(first, a.size, second, b.size))
            };
            let any_overlap = (0..regions.len())
                .any(|first| (0..first).any(|second| overlap(&regions[first], &regions[second])));
            match Layout::new(regions.clone()) {
                Ok(_) => prop_assert!(!any_overlap),
                Err(LayoutError::Overlap { first, second, from, to, .. }) => {
                    prop_assert!(first < second && from < to);
                    prop_assert!(overlap(&regions[first], &regions[second]));
                }
                Err(other) => prop_assert!(false, "{}", other),
            }
        }

        #[test]
        fn takes_or_refuses_any_numbers_without_a_panic(
            drawn in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), 0..64_u32), 0..4),
            address in any::<u64>(),
        ) {
            let regions = drawn
                .iter()
                .map(|(hva, size, offset, shift)| {
                    let mask = !4095;
                    region(hva & mask, (size >> shift) & mask, (offset >> shift) & mask)
                })
                .collect();
            if let Ok(layout) = Layout::new(regions) {
                layout.find_hva(address);
                layout.pages_in_hva(address, u64::MAX).count();
                layout.place(layout.pages() - 1);
            }
        }
    }

    #[test]
    fn refuses_what_is_no_memory_and_says_what_to_do() {
        let said = |regions: Vec<Region>| Layout::new(regions).unwrap_err().to_string();
        assert_eq!(said(vec![]), "there is no region; a VM has at least one");
        assert_eq!(
            said(vec![region(0, 4096, 0), region(4096, 0, 4096)]),
            "region 1 has size 0; leave it out, or give its size in bytes"
        );
        assert_eq!(
            said(vec![region(0x1001, 4096, 0)]),
            "region 0: its host-virtual address 0x1001 is not a multiple of its page size (4 KiB); regions begin and end at a page"
        );
        let huge = Region { page_size: PageSize::Huge, ..region(0, 4096, 0) };
        assert_eq!(
            said(vec![huge]),
            "region 0: its size 0x1000 is not a multiple of its page size (2 MiB); regions begin and end at a page"
        );
        assert_eq!(
            said(vec![region(!0xfff, 8192, 0)]),
            "region 0: its host-virtual addresses start at 0xfffffffffffff000 and go on for 0x2000 bytes, past the end of 64 bits"
        );
        assert_eq!(
            said(vec![region(0x1000, 8192, 0), region(0x2000, 4096, 8192)]),
            "regions 0 and 1 share host-virtual addresses from 0x2000 to 0x3000; each byte belongs to one region"
        );
        assert_eq!(
            said(vec![region(0, 1 << 44, 0)]),
            "the regions have 4294967296 pages; a session has at most 4294967295, so use larger pages"
        );
    }

    #[test]
    fn takes_the_largest_memory_that_an_index_can_count() {
        let layout = Layout::new(vec![region(0, u64::from(u32::MAX) << 12, 0)]).unwrap();
        assert_eq!(layout.pages(), u32::MAX);
        assert_eq!(layout.find_offset(layout.end() - 1), Some(u32::MAX - 1));
        assert_eq!(layout.region_end(u32::MAX - 1), u32::MAX);
    }

    #[test]
    fn an_empty_or_backward_removal_covers_nothing() {
        let layout = Layout::new(vec![region(0x4000, 0x4000, 0)]).unwrap();
        assert_eq!(layout.pages_in_hva(0x5000, 0x5000).count(), 0);
        assert_eq!(layout.pages_in_hva(0x6000, 0x5000).count(), 0);
        assert_eq!(layout.pages_in_hva(0, u64::MAX).next(), Some(0..4));
    }
}
