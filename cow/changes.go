// The change tracking of a device or an image, as its users see it.

package cow

import (
	"cmp"
	"fmt"
	"iter"
	"syscall"
	"time"

	"github.com/google/uuid"

	"blksnap/cbt"
)

// Tracking is what a device's change tracking is called and counts at one moment.
type Tracking struct {
	facts cbt.Facts
	began *beginning
}

// beginning is why a generation began.
type beginning struct {
	generation uuid.UUID
	why        string
}

// Tracking says where the device's change tracking stands. Unlike Changes it takes no
// lock and costs the device's writers nothing: scripts ask for the number every second.
func (d *Device) Tracking() Tracking { return Tracking{d.changes().Facts(), d.began.Load()} }

// MapSize is how many tracking blocks there are: the length of the map in bytes.
func (t Tracking) MapSize() int64 { return t.facts.Blocks }

// BlockSize is the size of a tracking block in bytes.
func (t Tracking) BlockSize() int64 { return t.facts.BlockSize }

// Generation is a UUID: history is continuous only inside one generation.
func (t Tracking) Generation() string { return t.facts.Generation.String() }

// Reason says why the generation began; empty where that is not known any more, because
// the machine was started anew since, or we were killed while it began.
func (t Tracking) Reason() string {
	if t.began == nil || t.began.generation != t.facts.Generation {
		return ""
	}
	return t.began.why
}

// Number is the last snapshot's number.
func (t Tracking) Number() uint64 { return t.facts.Number }

// Base is what to add to a map byte to get a number.
func (t Tracking) Base() uint64 { return t.facts.Base }

// Changes is the change tracking of an image, or of a device as it was when it
// was asked. Its methods may be called from many goroutines at once.
type Changes struct {
	device *Device
	view   *cbt.View
	runs   func(off, n int64) iter.Seq2[Run, error]
}

// Changes is the device's change tracking as of now.
func (d *Device) Changes() *Changes { return &Changes{d, d.changes().View(), d.Runs} }

// Changes is the change tracking frozen at the image's instant.
func (i *Image) Changes() *Changes { return &Changes{i.device, &i.frozen.View, i.Runs} }

// MapSize is how many tracking blocks there are: the length of the map in bytes.
func (c *Changes) MapSize() int64 { return c.view.Blocks() }

// ReadMap fills p with the map's bytes from off on, one for each tracking block:
// the number of the snapshot interval in which it last changed, less Base; 0 for
// no change since. It returns how many there were.
func (c *Changes) ReadMap(p []byte, off int64) (n int) {
	c.device.always(func() { n = c.view.ReadMap(p, off) })
	return n
}

// BlockSize is the size of a tracking block in bytes.
func (c *Changes) BlockSize() int64 { return c.view.BlockSize() }

// Generation is a UUID: history is continuous only inside one generation.
func (c *Changes) Generation() string { return c.view.Generation().String() }

// Number is the last snapshot's number; of an image, its own.
func (c *Changes) Number() uint64 { return c.view.Number() }

// Base is what to add to a map byte to get a number.
func (c *Changes) Base() uint64 { return c.view.Base() }

// Since yields what changed after snapshot num: ascending, disjoint, cut to the
// device, holes apart from data. It returns false where that is not known, because
// num is below Base or above Number: a full read is due.
func (c *Changes) Since(num uint64) (iter.Seq2[Run, error], bool) {
	changed, ok := c.view.Since(num)
	if !ok {
		return nil, false
	}
	return func(yield func(Run, error) bool) {
		all := false // of the runs were asked for
		ended := c.device.guarded(func() {
			for off, n := range changed {
				for r, err := range c.runs(off, n) {
					if !yield(r, err) || err != nil {
						return
					}
				}
			}
			all = true
		})
		if !ended || all && c.view.Gone() {
			yield(Run{}, errFaulted)
		}
	}, true
}

// All yields everything that is allocated: what a first, full copy must read.
func (c *Changes) All() iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		for r, err := range c.runs(0, c.view.Size()) {
			if err == nil && r.Zero {
				continue
			}
			if !yield(r, err) || err != nil {
				return
			}
		}
	}
}

// Mark marks a range as changed after the last snapshot, so that the next
// increment reads it: for what changed in a way that no write shows.
func (d *Device) Mark(off, n int64) error {
	if off < 0 || n <= 0 || n > d.Size() || off > d.Size()-n {
		return fmt.Errorf("mark %s: range %d:%d is not within its %d bytes: %w", d.name, off, n, d.Size(), syscall.EINVAL)
	}
	// Recorded as for a write: the mark must outlive a loss of power, too.
	g, err := d.letIn(off, n)
	if err != nil {
		return err
	}
	defer d.writers.leave(g)
	d.mark(off, n)
	return nil
}

// Reset begins a new generation of the device's change map, and says why: history
// before it cannot be asked for any more, nor does a loss of power bring it back.
func (d *Device) Reset(why string) error {
	release, err := d.holdDurable()
	if err != nil {
		return fmt.Errorf("reset change map of %s: %w", d.name, err)
	}
	defer release()
	d.dropDurable()
	d.taking.Lock()
	defer d.taking.Unlock()
	if d.stopped() { // the gate is shut for ever
		return ErrStopping
	}
	d.writers.shut()
	defer d.writers.open()
	if !d.writers.empty(time.Now().Add(takeLimit)) {
		return fmt.Errorf("reset change map of %s: writes in flight did not end within %v: %w", d.name, takeLimit, syscall.ETIMEDOUT)
	}
	d.newGeneration(why)
	d.poke()
	return nil
}

// newGeneration is Reset for those who have emptied the gate.
func (d *Device) newGeneration(why string) {
	if err := d.replaceLease(); err != nil {
		d.cfg.Log.Error("cannot begin a new lease: the next start gives the snapshots up", "err", err)
	}
	generation := uuid.New()
	d.noteReason(generation, why)
	d.cat.did("note a reason")
	if !d.renewChanges(generation) {
		d.always(func() { d.changes().Reset(generation) })
	}
	d.cat.did("begin a generation")
	d.tellGeneration(why)
}

// noteReason notes why a generation begins, for the next start: that takes it for no other
// generation, so it does not matter which of them a kill leaves.
func (d *Device) noteReason(generation uuid.UUID, why string) {
	d.always(func() {
		b := d.leaseMemory.Bytes()
		wordAt(b, reasonAt).Store(0)
		copy(b[reasonOfAt:], generation[:])
		n := copy(b[reasonTextAt:][:maxReason], why)
		wordAt(b, reasonAt).Store(uint64(n))
	})
	d.began.Store(&beginning{generation, why})
}

// findReason finds what a predecessor noted.
func (d *Device) findReason() {
	b := d.leaseMemory.Bytes()
	why := string(b[reasonTextAt:][:min(wordAt(b, reasonAt).Load(), maxReason)])
	d.began.Store(&beginning{uuid.UUID(b[reasonOfAt:][:16]), why})
}

func (d *Device) tellGeneration(why string) {
	text := fmt.Sprintf("new generation %s: %s; a full copy is due", d.changes().Generation(), why)
	d.cfg.Log.Warn("new generation", "text", text)
	d.event(EventGeneration, "", text)
}

// changes is the device's change map.
func (d *Device) changes() *cbt.Map { return d.tracked.Load() }

// newChanges makes an empty map.
func (d *Device) newChanges(generation uuid.UUID) error {
	block := cmp.Or(d.cfg.TrackingBlock, cbt.DefaultBlock)
	mem, err := d.changesAt(block)
	if err != nil {
		return err
	}
	m, err := cbt.New(mem, d.Size(), block, generation, d.cfg.Number)
	if err == nil {
		d.tracked.Store(m)
	}
	return err
}

// changesAt is the memory of the device's change map. It goes when nobody can look
// at it any more: who asked for the Changes of a device may keep them for longer
// than the device lives.
func (d *Device) changesAt(block int64) (*memory, error) {
	mem, err := memoryAt(d.path("changes"), changesReserve(d.Size(), block))
	if err != nil {
		return nil, err
	}
	mem.closeWhenUnused()
	d.mapMemory = mem
	return mem, nil
}

// changesReserve is the address space for a change map and the frozen ones that
// share its pages: enough for 256 snapshots between which every block changed, or
// for as many as address space allows.
func changesReserve(size, block int64) int64 {
	const most = 1 << 40
	blocks := size/block + 1
	if blocks > most/512 {
		return most
	}
	return max(1<<30, blocks*512)
}
