//! The loops that the pager is compared with do what they are said to do.
#![allow(clippy::unwrap_used, reason = "a test says so by panicking")]

mod support;

use std::io::ErrorKind;
use std::sync::Arc;

use support::{PAGE, elsewhere, finish, pages, registered};
use uffd::floor::{self, Waiting};
use uffd::{Features, Mapping, MappingKind, Modes};

/// Pages whose first byte is their number, from 1.
fn image(count: usize) -> Mapping {
    let image = pages(count, MappingKind::Private);
    for page in 0..count {
        image.write(page * PAGE as usize, &[page as u8 + 1]).unwrap();
    }
    image
}

/// The first byte of each page.
fn first_bytes(mapping: &Mapping, count: usize) -> Vec<u8> {
    let mut byte = [0];
    let read = |page: usize| mapping.read(page * PAGE as usize, &mut byte).map(|()| byte[0]);
    (0..count).map(read).collect::<Result<_, _>>().unwrap()
}

fn answers(how: Waiting) {
    let Some((uffd, mapping)) = registered(8, Modes::MISSING, Features::empty()) else { return };
    let mapping = Arc::new(mapping);
    let touched = Arc::clone(&mapping);
    let read = elsewhere(move || {
        for page in [6, 1, 3] {
            let place = (touched.address() + page * PAGE + 8) as *const u8;
            // SAFETY: inside of the mapping, which lives as long as this thread.
            unsafe { place.read_volatile() };
        }
    });

    floor::answer(&uffd, &mapping, &image(8), 3, how).unwrap();

    finish(&read);
    for page in [0, 2, 4, 5, 7] {
        uffd.zero(mapping.address() + page * PAGE, PAGE, true).unwrap();
    }
    assert_eq!(first_bytes(&mapping, 8), [0, 2, 0, 4, 0, 0, 7, 0], "these three, and no other");
}

#[test]
fn the_loop_answers_as_many_faults_as_it_was_told_to_each_with_its_page() {
    answers(Waiting::Sleep);
}

#[test]
fn so_does_the_loop_that_never_sleeps() {
    answers(Waiting::Spin);
}

#[test]
fn filling_copies_all_of_the_image_in_pieces_that_need_not_come_out_even() {
    let Some((uffd, mapping)) = registered(7, Modes::MISSING, Features::empty()) else { return };

    let took = floor::fill(&uffd, &mapping, &image(7), 3 * PAGE).unwrap();

    assert!(!took.is_zero());
    assert_eq!(first_bytes(&mapping, 7), [1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn an_image_that_is_too_small_is_refused_before_anything_is_copied() {
    let Some((uffd, mapping)) = registered(2, Modes::MISSING, Features::empty()) else { return };
    let small = image(1);

    let answered = floor::answer(&uffd, &mapping, &small, 1, Waiting::Sleep).unwrap_err();
    let filled = floor::fill(&uffd, &mapping, &small, PAGE).unwrap_err();

    assert_eq!([answered.kind(), filled.kind()], [ErrorKind::InvalidInput; 2]);
}
