//! What an NBD client says, and the file that keeps what it writes.

use crate::{Check, Format};
use cdp_protocol::record::Volume;
use cdp_protocol::units::{Epoch, FrameHash, GroupId, Head, VolumeSlot};
use cdp_target::nbd::option::{self, HEADER_BYTES as OPTION_HEADER_BYTES};
use cdp_target::nbd::overlay::State;
use cdp_target::nbd::overlay::format::{self, Base, Copy, HEADER_BYTES, PAGE_BLOCKS, PAGE_BYTES};
use cdp_target::nbd::request::{self, Agreed, REQUEST_BYTES};

/// Of which volume, and which of its pages.
const PLACE: (u16, u32) = (1, 2);

/// An option with its header.
pub(crate) struct OptionWords;

impl Format for OptionWords {
    const CHECK: Check = Check::Nothing;
    const ONE_FORM: bool = false;

    fn specimens() -> Vec<Vec<u8>> {
        let string = |text: &str| [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat();
        let of = |number: u32, data: Vec<u8>| {
            let numbers = [number.to_be_bytes(), (data.len() as u32).to_be_bytes()].concat();
            [b"IHAVEOPT".as_slice(), &numbers, &data].concat()
        };
        let queries = [string("root"), vec![0, 0, 0, 2], string("base:allocation"), string("base:")].concat();
        vec![
            of(1, b"root".to_vec()),
            of(2, vec![]),
            of(3, vec![]),
            of(5, vec![]),
            of(6, [string("root@2h"), vec![0, 0]].concat()),
            of(7, [string("root@before-upgrade"), vec![0, 3, 0, 1, 0, 2, 0, 3]].concat()),
            of(8, vec![]),
            of(9, [string("root"), vec![0; 4]].concat()),
            of(10, queries),
            of(11, vec![]),
        ]
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let (header, data) = bytes.split_first_chunk::<OPTION_HEADER_BYTES>()?;
        let header = option::parse_header(header)?;
        let data = data.get(..header.len as usize)?;
        let asked = option::parse(header.number, data).ok()?;
        Some(format!("{asked:?}").into_bytes())
    }

    /// Printed, a byte of a name may be ten.
    fn memory_max(len: usize) -> usize {
        (64 << 10) + 64 * len
    }
}

/// A request of the transmission phase, which passes the check only where it lies within the export.
pub(crate) struct RequestWords;

impl Format for RequestWords {
    const CHECK: Check = Check::Nothing;
    const ONE_FORM: bool = false;

    fn specimens() -> Vec<Vec<u8>> {
        let of = |kind: u16, flags: u16, offset: u64, len: u32| {
            let words = [flags.to_be_bytes(), kind.to_be_bytes()].concat();
            let numbers = [7_u64.to_be_bytes(), offset.to_be_bytes()].concat();
            [&0x2560_9513_u32.to_be_bytes(), words.as_slice(), &numbers, &len.to_be_bytes()].concat()
        };
        let mut specimens: Vec<_> = (0..8).map(|kind| of(kind, 0, 4096 * u64::from(kind), 4096)).collect();
        specimens.extend([of(0, 4, 1 << 30, 32 << 20), of(6, 0x13, 0, u32::MAX), of(1, 1, (1 << 40) - 512, 512)]);
        specimens
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let request = request::parse(bytes.first_chunk::<REQUEST_BYTES>()?)?;
        for (writable, structured) in [(false, false), (false, true), (true, true)] {
            let agreed = Agreed { size_bytes: 1 << 40, writable, structured, allocation: structured };
            let is_ranged = !matches!(request.kind, request::Kind::Flush | request::Kind::Disconnect);
            if request.check(&agreed).is_ok() && is_ranged {
                let end = u128::from(request.offset) + u128::from(request.len);
                assert!(end <= 1 << 40 && request.payload_bytes() <= 32 << 20, "{request:?}");
            }
        }
        Some(format!("{request:?}").into_bytes())
    }
}

/// The header of an overlay.
pub(crate) struct OverlayHeader;

impl Format for OverlayHeader {
    const CHECK: Check = Check::Crc;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let volume = |slot, name: &str| Volume { slot: VolumeSlot(slot), size_bytes: 1 << 40, name: name.into() };
        let base = |volumes| Base {
            group: GroupId([7; 16]),
            head: Head { epoch: Epoch(9), hash: FrameHash([3; 32]) },
            volumes,
        };
        let many = (0..64).map(|slot| volume(slot, &format!("{slot:064}"))).collect();
        [vec![volume(0, "root"), volume(7, "data")], many, vec![]]
            .map(|volumes| format::encode_header(&base(volumes)))
            .to_vec()
    }

    fn mend(bytes: &mut [u8]) {
        mend_end(bytes, HEADER_BYTES);
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        format::decode_header(bytes.try_into().ok()?).ok().map(|base| format::encode_header(&base))
    }
}

/// A page of an overlay's map.
pub(crate) struct OverlayPage;

impl Format for OverlayPage {
    const CHECK: Check = Check::Crc;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let page =
            |sequence, states: &[(u32, State)]| format::encode_page(PLACE.0, PLACE.1, sequence, states.iter().copied());
        let all: Vec<_> = (0..PAGE_BLOCKS).map(|number| (number, State::Written)).collect();
        let few = [(0, State::Written), (1, State::Zero), (PAGE_BLOCKS - 1, State::Zero)];
        vec![page(1, &few), page(u64::MAX, &all), page(2, &[])]
    }

    fn mend(bytes: &mut [u8]) {
        mend_end(bytes, PAGE_BYTES);
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        match format::decode_page(PLACE.0, PLACE.1, bytes.try_into().ok()?) {
            Copy::Whole { sequence, states } => {
                Some(format::encode_page(PLACE.0, PLACE.1, sequence, states.into_iter()))
            }
            Copy::Blank | Copy::Bad => None,
        }
    }

    /// A state of two bits is eight bytes in memory, in a list that doubles.
    fn memory_max(len: usize) -> usize {
        (64 << 10) + 128 * len
    }
}

/// Puts the CRC at the end of `len` bytes in order.
fn mend_end(bytes: &mut [u8], len: usize) {
    if bytes.len() == len {
        let crc = crc32fast::hash(&bytes[..len - 4]).to_le_bytes();
        bytes[len - 4..].copy_from_slice(&crc);
    }
}
