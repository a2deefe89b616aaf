// Looking at parts without using them.

package store

import (
	"fmt"
	"io"
	"os"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// Inspect reads the header of the part that spec names, a file or a block device that
// may be in use, and changes nothing. It returns the part's UUID and how many slots
// it can hold something in. Errors are those of Open.
func Inspect(spec Spec) (id uuid.UUID, slots int64, err error) {
	f, err := os.OpenFile(spec.Path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO is no snapstore
	if err != nil {
		return uuid.Nil, 0, cause(err)
	}
	defer f.Close()
	h, err := readHeader(f)
	if err != nil {
		return uuid.Nil, 0, cause(err)
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return uuid.Nil, 0, cause(err)
	}
	return h.id, min(max(0, size-dataStart+SlotSize-1)/SlotSize, maxSlots), nil
}

// Slots is how many slots the part with a number has addresses for.
func (p *Pool) Slots(no uint8) (int64, error) {
	l := p.byNo[no].Load()
	if l == nil {
		return 0, fmt.Errorf("part %d of the snapstore is not there", no)
	}
	return l.traits.Slots, nil
}

// Used returns the blocks of a slot that are in use, none where the slot is not.
func (p *Pool) Used(s Slot) uint16 {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.byNo[s.Part()].Load()
	if l == nil || !l.inUse.has(s.index()) {
		return 0
	}
	return l.slot(s.index()).used
}

// Index counts the slots of a part.
func (s Slot) Index() int64 { return s.index() }
