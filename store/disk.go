// What parts in files and on block devices have in common.

package store

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// disk reads and writes slots through the page cache of a file or a device.
//
// The page cache has a trap: a write succeeds, its page cannot be written back
// later, the kernel drops it, and the next read finds on the disk what was
// there before, without an error. The kernel tells of it once, to whoever asks.
// So disk asks after each read, and does not trust anything once it heard of
// one: which page it was is not said.
//
// The same goes for a file that somebody cut short, to have room on a full disk: the
// next write makes it longer again, and what was cut off reads as zeroes. It stays
// shorter than we have made it, because we do that in long steps.
type disk struct {
	f      *os.File
	conn   syscall.RawConn
	traits Traits
	size   atomic.Int64 // of the file, which nobody else changes; 0 of a device

	// mu is held while the kernel is asked, which does not wait, so that
	// nobody is told that all is well before lost is set.
	mu   sync.Mutex
	lost error
	long bool             // whether to look if the file is as long as it was
	ask  func(fd uintptr) // asks; made once, because every read needs it
	stat unix.Stat_t
}

func (d *disk) use(f *os.File) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	d.f, d.conn = f, conn
	d.ask = func(fd uintptr) {
		// Waits for nothing, because the header is written at once, but
		// reports errors of the whole file since it last did.
		err := unix.SyncFileRange(int(fd), 0, headerSize, unix.SYNC_FILE_RANGE_WAIT_BEFORE)
		if err != nil {
			// ENOSPC here is not for somebody who could write elsewhere.
			d.lost = fmt.Errorf("an earlier write did not reach the disk (%v): %w", err, unix.EIO)
			return
		}
		if !d.long {
			return
		}
		size := d.size.Load() // first: it grows
		if err := unix.Fstat(int(fd), &d.stat); err != nil {
			d.lost = err
		} else if d.stat.Size < size {
			d.lost = fmt.Errorf("it was cut short, from %d bytes to %d or less: %w", size, d.stat.Size, unix.EIO)
		}
	}
	return nil
}

func (d *disk) Traits() Traits { return d.traits }

func (d *disk) ReadAt(b []byte, off int64) (int, error) {
	n, err := d.f.ReadAt(b, dataStart+off)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, cmp.Or(cause(err), d.lostError(mayBeCut(b, off)))
}

// mayBeCut says whether some of b, which was read at off, can be what is left where a
// file was cut: the end of a block is zero then. To look only there saves a system call
// for most reads.
func mayBeCut(b []byte, off int64) bool {
	for end := BlockSize - off%BlockSize; end < int64(len(b)); end += BlockSize {
		if b[end-1] == 0 {
			return true
		}
	}
	return len(b) > 0 && b[len(b)-1] == 0
}

func (d *disk) WriteAt(b []byte, off int64) (int, error) {
	n, err := d.f.WriteAt(b, dataStart+off)
	return n, noSpace(cause(err))
}

// lostError returns an error if a page was ever lost on its way to the disk, or the
// file cut short, which is looked at only where long is set.
func (d *disk) lostError(long bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lost != nil {
		return d.lost
	}
	d.long = long
	if err := d.conn.Control(d.ask); err != nil {
		return err
	}
	return d.lost
}

// writeHeader makes h durable: a power cut must not leave what is taken for
// something foreign.
func (d *disk) writeHeader(h header) error {
	if _, err := d.f.WriteAt(h.encode(), 0); err != nil {
		return fmt.Errorf("write header: %w", cause(err))
	}
	if err := d.f.Sync(); err != nil {
		return fmt.Errorf("sync header: %w", cause(err))
	}
	return nil
}

func (d *disk) Close() error { return d.f.Close() }

// control calls fn with the descriptor of the file, which stays open until fn
// returns, again if a signal ended it.
func (d *disk) control(fn func(fd int) error) (err error) {
	closed := d.conn.Control(func(fd uintptr) {
		for {
			if err = fn(int(fd)); err != unix.EINTR {
				return
			}
		}
	})
	return cmp.Or(closed, err)
}

// cause takes the operation and the path, which the caller names, off err.
func cause(err error) error {
	if err == nil {
		return nil // and nothing is allocated
	}
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}

// noSpace lets every way to say that there is no room match ENOSPC.
func noSpace(err error) error {
	if errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EFBIG) {
		return fmt.Errorf("%w (%w)", err, syscall.ENOSPC)
	}
	return err
}
