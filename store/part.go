// Parts: what a pool needs of a piece of memory, a file or a block device.

package store

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/google/uuid"
)

// Errors that say why a part cannot be opened. Each asks its reader for
// something else.
var (
	// ErrInUse: another process, or this one, has the part open.
	ErrInUse = fmt.Errorf("in use by another process: %w", syscall.EBUSY)

	// ErrForeign: it holds something that is not a snapstore.
	ErrForeign = errors.New("not a snapstore")

	// ErrNewer: a later version of this program made it.
	ErrNewer = errors.New("made by a newer version of blksnap")

	// ErrDamaged: it is a snapstore, but its header does not add up.
	ErrDamaged = errors.New("damaged snapstore")
)

// A Part is one piece of a pool. A pool calls it from many goroutines at once,
// never twice at once for the same bytes except to read them. Offsets count
// from the part's first slot and lie, like off+n, within Traits.Slots slots.
// Where an operation can hang, Traits.MayHang says so.
type Part interface {
	// Traits is what does not change while the part is open.
	Traits() Traits

	// ReadAt fills b from off or returns an error. What was never written
	// or was punched reads as anything.
	ReadAt(b []byte, off int64) (int, error)

	// WriteAt writes the whole of b at off or returns an error, one for
	// which errors.Is(err, syscall.ENOSPC) holds if backing is used up. It
	// promises nothing about durability: snapshots do not outlive a reboot.
	WriteAt(b []byte, off int64) (int, error)

	// Prepare makes backing for [off, off+n), which holds nothing, in one
	// go. After an error some of it may be there.
	Prepare(off, n int64) error

	// Punch gives the backing of [off, off+n) back.
	Punch(off, n int64) error

	// NextData is the first offset from off on that may hold data, or the end
	// of the last slot if there is none. Backing that was prepared and never
	// written is no data.
	NextData(off int64) (int64, error)

	// Avail is how many bytes of backing can still be had.
	Avail() (int64, error)

	// Close leaves the content as it is.
	Close() error
}

// Traits describe an open part.
type Traits struct {
	Spec Spec      // opens it again
	ID   uuid.UUID // kept in its header; zero for memory

	// Limit is how many bytes the blocks in use may take in all.
	Limit int64

	// Slots is how many slots it has addresses for. They are more than its
	// limit has room for where a slot need not have backing for each block.
	Slots int64

	// Held is how many slots, counted from its first, may hold what a
	// predecessor wrote.
	Held int64

	// Coarse says that a slot takes 16 blocks whatever is written to it,
	// and keeps them.
	Coarse bool

	// MayHang says that I/O may never return.
	MayHang bool
}

// Open opens the part that spec names, and creates it where it is a file that
// does not exist or is empty. With force it also takes over what holds
// something else, which is lost.
func Open(spec Spec, force bool) (Part, error) {
	switch spec.Kind {
	case Mem:
		return OpenMem(spec.Limit)
	case File:
		return OpenFile(spec.Path, spec.Limit, force)
	case Dev:
		return OpenDev(spec.Path, force)
	}
	return nil, fmt.Errorf("open snapstore: unknown kind %q", spec.Kind)
}

// sparseSlots is how many slots a part with a limit of n bytes has addresses
// for if backing is made only for blocks that are written: enough for slots
// with a single block each.
func sparseSlots(n int64) int64 {
	return min(n/BlockSize, maxSlots)
}
