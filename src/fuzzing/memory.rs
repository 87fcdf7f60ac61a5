//! A file in memory, to be read.

use std::io;

use crate::queue::spool::fs::SpoolFile;

/// A file that is read in small steps.
#[derive(Debug)]
pub(super) struct Memory<'a> {
    pub(super) content: &'a [u8],
    pub(super) step: usize,
}

impl SpoolFile for Memory<'_> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let offset = usize::try_from(offset).expect("offsets are small");
        let left = self.content.get(offset..).unwrap_or_default();
        let read = left.len().min(buffer.len()).min(self.step);
        buffer[..read].copy_from_slice(&left[..read]);
        Ok(read)
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<usize> {
        unreachable!("it is only read")
    }

    fn allocate(&self, _: u64) -> io::Result<()> {
        unreachable!("it is only read")
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        unreachable!("it is only read")
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.content.len() as u64)
    }

    fn sync_data(&self) -> io::Result<()> {
        unreachable!("it is only read")
    }
}
