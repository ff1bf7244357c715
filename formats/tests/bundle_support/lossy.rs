//! A disk that loses power: keeps what was synchronised, and of the rest any part, sector by sector.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use flashlm_formats::bundle::Storage;

const SECTOR: usize = 512;

/// What is on the disk, and what only the page cache knows.
#[derive(Default)]
pub struct Disk {
    durable: Vec<u8>,
    pending: Vec<(u64, Vec<u8>)>,
    pub published: bool,
    /// Operations until power fails; `None` for never.
    pub power: Option<usize>,
    pub operations: usize,
}

fn put(image: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let end = offset as usize + bytes.len();
    if image.len() < end {
        image.resize(end, 0);
    }
    image[offset as usize..end].copy_from_slice(bytes);
}

impl Disk {
    pub fn holding(bytes: Vec<u8>) -> Self {
        Self { durable: bytes, ..Self::default() }
    }

    fn operate(&mut self) -> io::Result<()> {
        if self.power == Some(self.operations) {
            return Err(io::Error::other("power failed"));
        }
        self.operations += 1;
        Ok(())
    }

    /// What is found after a crash: of every sector that was not synchronised, a coin decides. `coin` 0 loses all of them, 1 none.
    pub fn after_crash(&self, coin: u64) -> Vec<u8> {
        let mut image = self.durable.clone();
        let mut state = coin;
        for (offset, bytes) in &self.pending {
            let mut at = 0;
            while at < bytes.len() {
                let sector_end = (*offset as usize + at) / SECTOR * SECTOR + SECTOR - *offset as usize;
                let end = sector_end.min(bytes.len());
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let keep = match coin {
                    0 => false,
                    1 => true,
                    _ => state >> 63 == 1,
                };
                if keep {
                    put(&mut image, offset + at as u64, &bytes[at..end]);
                }
                at = end;
            }
        }
        image
    }
}

/// A handle on a [`Disk`], for a writer.
#[derive(Clone, Default)]
pub struct Lossy(pub Rc<RefCell<Disk>>);

impl Storage for Lossy {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.0.borrow_mut();
        let failed = disk.operate();
        // A write that is interrupted may have happened in part, like any other that was not synchronised.
        disk.pending.push((offset, bytes.to_vec()));
        failed
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut disk = self.0.borrow_mut();
        disk.operate()?;
        for (offset, bytes) in std::mem::take(&mut disk.pending) {
            put(&mut disk.durable, offset, &bytes);
        }
        Ok(())
    }

    fn publish(&mut self) -> io::Result<()> {
        let mut disk = self.0.borrow_mut();
        disk.operate()?;
        assert!(disk.pending.is_empty(), "published before everything was durable");
        disk.published = true;
        Ok(())
    }
}
