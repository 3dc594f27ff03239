//! Coded blocks: numbers by the planes of their bytes, each compressed where that helps; differences between numbers.
//!
//! Touches: nothing. A block that is read has exactly the length that was asked for, or there is an error; nothing is
//! believed of a frame but what is checked, as it may be a stranger's.

use zstd::bulk::{Compressor, Decompressor};

use crate::format::Flaw;

/// Bytes of a block, the last one of a storage excepted: each is coded, and can be read, without the others.
pub const BLOCK: usize = 1 << 20;
/// Bytes that a number may have.
pub const WIDTHS: [u64; 4] = [1, 2, 4, 8];
/// What zstd is asked for: beyond it, planes of numbers get hardly smaller and take much longer.
const LEVEL: i32 = 1;

// A frame is the block as it is, or shorter than the block and then
// | length of each plane's bytes below, u32, as many as a number has bytes | planes | bytes behind the last whole number |
// A plane whose length is the count of the numbers is there as it is, a shorter one as zstd frames.
const PLANE_HEAD: usize = 4;

/// How many bytes the numbers of a block take; what is behind them is less than one number.
fn numbers_in(length: usize, width: usize) -> usize {
    length - length % width
}

/// Which planes of numbers are compressed, the lowest byte's first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Planes(u8);

impl Planes {
    /// All of them.
    pub const ALL: Planes = Planes(u8::MAX);
    /// None of them.
    pub const NONE: Planes = Planes(0);

    fn has(self, plane: usize) -> bool {
        self.0 >> plane & 1 == 1
    }
}

/// Codes blocks. Its memory is used again from one to the next.
pub struct Coder {
    compressor: Compressor<'static>,
    planes: Vec<u8>,
    frame: Vec<u8>,
}

impl std::fmt::Debug for Coder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coder").finish_non_exhaustive()
    }
}

impl Default for Coder {
    fn default() -> Coder {
        Coder {
            compressor: Compressor::new(LEVEL).expect("the level is one of zstd's"),
            planes: Vec::new(),
            frame: Vec::new(),
        }
    }
}

impl Coder {
    /// The frame of a block of numbers of `width` bytes, as short as it becomes with these planes compressed.
    pub fn encode<'a>(&'a mut self, block: &'a [u8], width: usize, compressed: Planes) -> &'a [u8] {
        let whole = numbers_in(block.len(), width);
        let count = whole / width;
        if compressed == Planes::NONE || count == 0 {
            return block;
        }
        self.split(&block[..whole], width);
        self.frame.clear();
        self.frame.resize(PLANE_HEAD * width, 0);
        for plane in 0..width {
            let bytes = &self.planes[plane * count..(plane + 1) * count];
            let start = self.frame.len();
            let length = if compressed.has(plane) {
                self.frame.resize(start + count, 0);
                let packed = self
                    .compressor
                    .compress_to_buffer(bytes, &mut self.frame[start..]);
                packed.ok().filter(|length| *length < count) // An error where there is no room for it.
            } else {
                None
            };
            self.frame.truncate(start + length.unwrap_or(0));
            if length.is_none() {
                self.frame.extend_from_slice(bytes);
            }
            let length = length.unwrap_or(count) as u32;
            self.frame[PLANE_HEAD * plane..PLANE_HEAD * (plane + 1)].copy_from_slice(&length.to_le_bytes());
        }
        self.frame.extend_from_slice(&block[whole..]);
        if self.frame.len() < block.len() {
            &self.frame
        } else {
            block
        }
    }

    /// Which planes of a sample of numbers get at least a twentieth shorter, and how long the sample is then.
    pub fn weigh(&mut self, sample: &[u8], width: usize) -> (Planes, usize) {
        let whole = numbers_in(sample.len(), width);
        let count = whole / width;
        self.split(&sample[..whole], width);
        let (mut worth, mut sum) = (Planes::NONE, PLANE_HEAD * width);
        for plane in 0..width {
            let bytes = &self.planes[plane * count..(plane + 1) * count];
            self.frame.resize(count, 0);
            let packed = self.compressor.compress_to_buffer(bytes, &mut self.frame[..]);
            let length = packed.unwrap_or(count).min(count);
            let pays = length < count - count / 20;
            worth.0 |= u8::from(pays) << plane;
            sum += if pays { length } else { count };
        }
        (worth, sum)
    }

    fn split(&mut self, numbers: &[u8], width: usize) {
        self.planes.resize(numbers.len().max(self.planes.len()), 0);
        let planes = &mut self.planes[..numbers.len()];
        match width {
            1 => planes.copy_from_slice(numbers),
            2 => split::<2>(numbers, planes),
            4 => split::<4>(numbers, planes),
            8 => split::<8>(numbers, planes),
            _ => unreachable!("a width is one of those that there are"),
        }
    }
}

/// Reads coded blocks. Its memory is used again from one to the next.
pub struct Decoder {
    decompressor: Decompressor<'static>,
    planes: Vec<u8>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").finish_non_exhaustive()
    }
}

impl Default for Decoder {
    fn default() -> Decoder {
        Decoder {
            decompressor: Decompressor::new().expect("zstd has memory for a context"),
            planes: Vec::new(),
        }
    }
}

impl Decoder {
    /// Fills a block from its frame.
    ///
    /// # Errors
    ///
    /// [`Flaw::Malformed`] where the frame is not one of a block of this length; the block's content is unspecified then.
    pub fn decode(&mut self, frame: &[u8], width: usize, block: &mut [u8]) -> Result<(), Flaw> {
        if frame.len() == block.len() {
            block.copy_from_slice(frame);
            return Ok(());
        }
        let length = block.len();
        let wrong = || Flaw::malformed(format!("a frame of {} bytes of a block of {length}", frame.len()));
        let whole = numbers_in(length, width);
        let (count, behind) = (whole / width, length - whole);
        let (heads, mut rest) = frame.split_at_checked(PLANE_HEAD * width).ok_or_else(wrong)?;
        self.planes.resize(whole.max(self.planes.len()), 0);
        for (head, plane) in heads
            .chunks_exact(PLANE_HEAD)
            .zip(self.planes[..whole].chunks_exact_mut(count.max(1)))
        {
            let length = u32::from_le_bytes(head.try_into().expect("four bytes")) as usize;
            let (bytes, others) = rest.split_at_checked(length).ok_or_else(wrong)?;
            rest = others;
            if length == count {
                plane.copy_from_slice(bytes);
            } else {
                let unpacked = self.decompressor.decompress_to_buffer(bytes, plane);
                if unpacked.map_err(|_| wrong())? != count {
                    return Err(wrong());
                }
            }
        }
        if rest.len() != behind {
            return Err(wrong());
        }
        let (numbers, tail) = block.split_at_mut(whole);
        match width {
            1 => numbers.copy_from_slice(&self.planes[..whole]),
            2 => join::<2>(&self.planes[..whole], numbers),
            4 => join::<4>(&self.planes[..whole], numbers),
            8 => join::<8>(&self.planes[..whole], numbers),
            _ => return Err(wrong()),
        }
        tail.copy_from_slice(rest);
        Ok(())
    }
}

fn split<const WIDTH: usize>(numbers: &[u8], planes: &mut [u8]) {
    let count = numbers.len() / WIDTH;
    let mut rest = planes;
    let planes: [&mut [u8]; WIDTH] = std::array::from_fn(|_| {
        let (plane, others) = std::mem::take(&mut rest).split_at_mut(count);
        rest = others;
        plane
    });
    for (index, number) in numbers.as_chunks::<WIDTH>().0.iter().enumerate() {
        for plane in 0..WIDTH {
            planes[plane][index] = number[plane];
        }
    }
}

fn join<const WIDTH: usize>(planes: &[u8], numbers: &mut [u8]) {
    let count = numbers.len() / WIDTH;
    let planes: [&[u8]; WIDTH] = std::array::from_fn(|plane| &planes[plane * count..(plane + 1) * count]);
    for (index, number) in numbers.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
        for plane in 0..WIDTH {
            number[plane] = planes[plane][index];
        }
    }
}

/// Makes numbers their differences to others: small ones near zero whatever their sign, 0, -1, 1, -2, ... as 0, 1, 2, 3.
/// Bytes behind the last whole number stay as they are.
///
/// Source: the zigzag encoding of Protocol Buffers.
pub fn subtract(numbers: &mut [u8], base: &[u8], width: usize) {
    assert_eq!(numbers.len(), base.len(), "a difference is of two of one length");
    macro_rules! each {
        ($number:ty, $signed:ty) => {
            for (number, base) in numbers.as_chunks_mut().0.iter_mut().zip(base.as_chunks().0) {
                let difference =
                    <$number>::from_le_bytes(*number).wrapping_sub(<$number>::from_le_bytes(*base));
                let sign = (difference as $signed >> (<$number>::BITS - 1)) as $number;
                *number = (difference << 1 ^ sign).to_le_bytes();
            }
        };
    }
    match width {
        1 => each!(u8, i8),
        2 => each!(u16, i16),
        4 => each!(u32, i32),
        _ => each!(u64, i64),
    }
}

/// Makes differences the numbers again; the opposite of [`subtract`].
pub fn add(differences: &mut [u8], base: &[u8], width: usize) {
    assert_eq!(
        differences.len(),
        base.len(),
        "a difference is of two of one length"
    );
    macro_rules! each {
        ($number:ty) => {
            for (number, base) in differences
                .as_chunks_mut()
                .0
                .iter_mut()
                .zip(base.as_chunks().0)
            {
                let zigzag = <$number>::from_le_bytes(*number);
                let difference = zigzag >> 1 ^ (zigzag & 1).wrapping_neg();
                *number = <$number>::from_le_bytes(*base)
                    .wrapping_add(difference)
                    .to_le_bytes();
            }
        };
    }
    match width {
        1 => each!(u8),
        2 => each!(u16),
        4 => each!(u32),
        _ => each!(u64),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block() -> impl Strategy<Value = Vec<u8>> {
        let noise = proptest::collection::vec(any::<u8>(), 0..3000);
        let numbers = proptest::collection::vec(0..50u32, 0..800).prop_map(|numbers| {
            numbers
                .into_iter()
                .flat_map(|number| (number << 20).to_le_bytes())
                .collect()
        });
        let same = (any::<u8>(), 0..5000usize).prop_map(|(byte, count)| vec![byte; count]);
        prop_oneof![noise, numbers, same]
    }

    proptest! {
        #[test]
        fn a_block_comes_back_whatever_its_numbers_and_whichever_planes_are_compressed(
            mut block in block(), width in 0..4usize, planes: u8, cut in 0..9usize
        ) {
            block.truncate(block.len().saturating_sub(cut));
            let width = WIDTHS[width] as usize;
            let mut coder = Coder::default();
            let frame = coder.encode(&block, width, Planes(planes)).to_vec();
            prop_assert!(frame.len() <= block.len());
            let mut found = vec![1; block.len()];
            Decoder::default().decode(&frame, width, &mut found).unwrap();
            prop_assert!(found == block);
        }

        #[test]
        fn differences_added_to_what_they_are_to_are_the_numbers(
            pairs in proptest::collection::vec((any::<u8>(), any::<u8>()), 0..200), width in 0..4usize
        ) {
            let (numbers, base): (Vec<u8>, Vec<u8>) = pairs.into_iter().unzip();
            let width = WIDTHS[width] as usize;
            let mut found = numbers.clone();
            subtract(&mut found, &base, width);
            let behind = numbers.len() % width;
            prop_assert_eq!(&found[found.len() - behind..], &numbers[numbers.len() - behind..]);
            add(&mut found, &base, width);
            prop_assert_eq!(found, numbers);
        }

        #[test]
        fn a_stranger_s_frame_fills_the_block_or_is_refused(
            frame in proptest::collection::vec(any::<u8>(), 0..400), length in 0..900usize, width in 0..4usize
        ) {
            let mut found = vec![0; length];
            let _ = Decoder::default().decode(&frame, WIDTHS[width] as usize, &mut found);
        }

        #[test]
        fn a_frame_of_which_any_bit_was_changed_or_that_was_cut_never_reads_past_its_block(
            block in block(), at: proptest::sample::Index, bit in 0..8u8, cut in 0..20usize
        ) {
            let mut frame = Coder::default().encode(&block, 4, Planes::ALL).to_vec();
            if !frame.is_empty() {
                let at = at.index(frame.len());
                frame[at] ^= 1 << bit;
                frame.truncate(frame.len().saturating_sub(cut));
            }
            let mut found = vec![0; block.len()];
            let _ = Decoder::default().decode(&frame, 4, &mut found);
        }
    }

    #[test]
    fn frames_that_say_more_or_less_than_their_block_are_refused() {
        let block: Vec<u8> = (0..1000u32)
            .flat_map(|number| (number / 9).to_le_bytes())
            .collect();
        let frame = Coder::default().encode(&block, 4, Planes::ALL).to_vec();
        assert!(frame.len() < 1000);
        let read = |frame: &[u8], length: usize| Decoder::default().decode(frame, 4, &mut vec![0; length]);
        assert_eq!(read(&frame, block.len()), Ok(()));
        for length in [
            0,
            3,
            block.len() - 4,
            block.len() - 1,
            block.len() + 1,
            2 * block.len(),
        ] {
            assert!(read(&frame, length).is_err(), "a block of {length}");
        }
        assert!(read(&[&frame[..], &[0]].concat(), block.len()).is_err());
        assert!(read(&frame[..frame.len() - 1], block.len()).is_err());
        let mut longer = frame.clone();
        longer[3] = 0x7f;
        assert!(read(&longer, block.len()).is_err());
    }

    #[test]
    fn a_sample_tells_which_planes_are_noise() {
        let mut noise = 1u32;
        let numbers: Vec<u8> = (0..20_000u32)
            .flat_map(|index| {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((noise >> 16) | (index / 1000) << 16).to_le_bytes()
            })
            .collect();
        let (planes, length) = Coder::default().weigh(&numbers, 4);
        assert_eq!(planes, Planes(0b1100));
        assert!((40_000..41_000).contains(&length), "{length}");
    }
}
