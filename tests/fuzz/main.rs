//! Fuzzing of every decoder that reads what a peer or a disk gave.
//!
//! Each target is a unit test (`cargo test`: its corpus, then random inputs for a second or `CDP_FUZZ_MS`) and a fuzzer
//! (`cargo bolero test -p cdp-tests TARGET`) in one. An input is a valid specimen and what to do to it (`edits`), checksums put in
//! order afterwards or not; or bytes as they are. What is held against each:
//!
//! * no panic, and no more memory than a bound that follows from the input's length (`allocation`);
//! * a change that a checksum covers is refused, or means what was there before;
//! * what is taken is encoded to the same bytes again, where the format has one form only.
//!
//! A new target is an implementation of `Format` and a line below. `CDP_WRITE_CORPUS=1` writes the specimens into its corpus.

mod allocation;
mod edits;
mod exports;
mod history;
mod images;
mod local_images;
mod nbd;
mod recovery;
mod store;
mod words;

use edits::Input;
use std::path::Path;
use std::time::Duration;

/// A decoder, and what holds of it.
pub(crate) trait Format {
    /// How surely it notices that bytes were changed.
    const CHECK: Check;
    /// Whether what it takes has one form only: decoded and encoded it is the same bytes.
    const ONE_FORM: bool;

    /// Valid bytes, of every kind there is. The same ones every time.
    fn specimens() -> Vec<Vec<u8>>;

    /// Puts checksums in order, as far as lengths allow.
    fn mend(_bytes: &mut [u8]) {}

    /// Decodes `bytes`; gives what they mean, encoded again; `None` where they are refused.
    fn decode(bytes: &[u8]) -> Option<Vec<u8>>;

    /// Bytes that decoding and encoding `len` bytes may take at once.
    fn memory_max(len: usize) -> usize {
        (64 << 10) + 16 * len
    }
}

/// What finds a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Check {
    /// Nothing: the bytes come over a line that is checked.
    Nothing,
    /// A CRC-32: surely a change within four bytes.
    Crc,
    /// A hash: any change.
    Hash,
}

macro_rules! targets {
    ($($name:ident: $format:ty,)*) => {$(
        #[test]
        fn $name() {
            let specimens = proven_specimens::<$format>();
            write_corpus(stringify!($name), &specimens);
            let target = bolero::check!().with_test_time(test_time()).with_iterations(usize::MAX);
            target.for_each(|input: &[u8]| try_one::<$format>(&specimens, input));
        }
    )*};
}

targets! {
    frame: history::FrameFormat,
    content: history::ContentFormat,
    record: history::RecordFormat,
    segment_header: store::SegmentHeader,
    segment_index: store::SegmentIndex,
    manifest: store::ManifestCopy,
    manifest_file: store::ManifestFile,
    kept_copy: store::KeptCopy,
    pack_header: images::PackStart,
    image_header: images::ImageStart,
    image_record: images::ImageRecord,
    segment_file: recovery::SegmentFile,
    recovered_group: recovery::RecoveredGroup,
    source_message: words::SourceWords,
    target_message: words::TargetWords,
    join: words::JoinWords,
    bundle: words::BundleText,
    memo: words::MemoFormat,
    spool_index: words::SpoolIndex,
    group_state: words::GroupStateText,
    saved_record: words::SavedRecord,
    local_header: local_images::LocalHeader,
    local_footer: local_images::LocalFooter,
    local_directory: local_images::LocalDirectory,
    local_slice: local_images::LocalSlice,
    local_image: local_images::LocalImage,
    export_record: exports::ExportRecord,
    nbd_option: nbd::OptionWords,
    nbd_request: nbd::RequestWords,
    overlay_header: nbd::OverlayHeader,
    overlay_page: nbd::OverlayPage,
}

/// Time for random inputs, a target.
fn test_time() -> Duration {
    let set = std::env::var("CDP_FUZZ_MS").ok().and_then(|text| text.parse().ok());
    Duration::from_millis(set.unwrap_or(1000))
}

/// The specimens, each of which has to be valid.
fn proven_specimens<F: Format>() -> Vec<Vec<u8>> {
    let specimens = F::specimens();
    for (at, specimen) in specimens.iter().enumerate() {
        let meaning = F::decode(specimen).unwrap_or_else(|| panic!("specimen {at} is valid"));
        assert!(!F::ONE_FORM || meaning == *specimen, "specimen {at} is encoded to the same bytes");
        let mut mended = specimen.clone();
        F::mend(&mut mended);
        assert_eq!(mended, *specimen, "there is nothing to mend in specimen {at}");
    }
    specimens
}

fn try_one<F: Format>(specimens: &[Vec<u8>], input: &[u8]) {
    let Some(input) = Input::read(input, specimens) else { return };
    let mut bytes = input.bytes();
    if input.is_mended() {
        F::mend(&mut bytes);
    }
    let (taken, peak) = allocation::peak_of(|| F::decode(&bytes));
    assert!(peak <= F::memory_max(bytes.len()), "{peak} bytes of memory for {} bytes", bytes.len());
    let Some(meaning) = taken else { return };
    assert!(!F::ONE_FORM || meaning == bytes, "encoded to other bytes than were decoded");
    let has_to_notice = match F::CHECK {
        Check::Nothing => false,
        Check::Crc => input.is_within_four_bytes(),
        Check::Hash => true,
    };
    if let Some(specimen) = input.specimen().filter(|_| has_to_notice && !input.is_mended()) {
        assert_eq!(F::decode(specimen), Some(meaning), "a change was taken");
    }
}

#[expect(clippy::disallowed_methods, reason = "writes into the source tree when asked to")]
fn write_corpus(target: &str, specimens: &[Vec<u8>]) {
    if std::env::var_os("CDP_WRITE_CORPUS").is_none() {
        return;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/__fuzz__").join(target).join("corpus");
    std::fs::create_dir_all(&folder).expect("made");
    for (at, specimen) in specimens.iter().enumerate() {
        std::fs::write(folder.join(format!("specimen-{at}")), edits::as_they_are(specimen)).expect("written");
    }
}

/// A decoder that is wrong in each of the three ways: the harness is worth what it finds.
mod wrong {
    use super::{Check, Format, try_one};

    struct Wrong;

    impl Format for Wrong {
        const CHECK: Check = Check::Hash;
        const ONE_FORM: bool = true;

        fn specimens() -> Vec<Vec<u8>> {
            vec![vec![0; 16]]
        }

        fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
            let len = u32::from_le_bytes(*bytes.first_chunk()?) as usize;
            let room: Vec<u8> = Vec::with_capacity(len);
            let last = bytes[len.min(16)];
            let same = bytes.len() == 16 && last == 0;
            (room.capacity() >= len && same).then(|| vec![0; 16])
        }
    }

    #[test]
    fn every_kind_of_fault_is_found() {
        let specimens = Wrong::specimens();
        let fails = |input: &[u8]| std::panic::catch_unwind(|| try_one::<Wrong>(&specimens, input)).is_err();
        let silent = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let found =
            [fails(&[1]), fails(&[1, 1, 1, 0, 0, 17]), fails(&[1, 1, 1, 0, 0x30, 1]), fails(&[1, 1, 1, 0x60, 0, 1])];
        std::panic::set_hook(silent);
        // As it was; past the end; a million bytes and more; a byte that nothing looks at.
        assert_eq!(found, [false, true, true, true]);
    }
}
