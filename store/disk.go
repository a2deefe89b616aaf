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
type disk struct {
	f      *os.File
	conn   syscall.RawConn
	traits Traits

	// mu is held while the kernel is asked, which does not wait, so that
	// nobody is told that all is well before lost is set.
	mu   sync.Mutex
	lost error
	ask  func(fd uintptr) // asks; made once, because every read needs it
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
		d.lost = unix.SyncFileRange(int(fd), 0, headerSize, unix.SYNC_FILE_RANGE_WAIT_BEFORE)
	}
	return nil
}

func (d *disk) Traits() Traits { return d.traits }

func (d *disk) ReadAt(b []byte, off int64) (int, error) {
	n, err := d.f.ReadAt(b, dataStart+off)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, cmp.Or(cause(err), d.writeBackError())
}

func (d *disk) WriteAt(b []byte, off int64) (int, error) {
	n, err := d.f.WriteAt(b, dataStart+off)
	return n, noSpace(cause(err))
}

// writeBackError returns an error if a page was ever lost on its way to the
// disk.
func (d *disk) writeBackError() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lost != nil {
		return d.lost
	}
	if err := d.conn.Control(d.ask); err != nil {
		return err
	}
	if d.lost != nil {
		// ENOSPC here is not for somebody who could write elsewhere.
		d.lost = fmt.Errorf("an earlier write did not reach the disk (%v): %w", d.lost, unix.EIO)
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
