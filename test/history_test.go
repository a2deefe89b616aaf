// What a disk may hold after a death that nobody saw coming: a model that knows
// which changes were sent, which were acknowledged, and when.

package test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// change is a write of a range, of zeroes as well.
type change struct {
	off         int64
	data        []byte
	whole       bool   // it is done completely, or not at all
	sent, acked uint64 // ticks; acked is 0 while no reply came
}

func (c *change) end() int64 { return c.off + int64(len(c.data)) }

// disk is the model of a device, or of an image that is written to. Changes that
// are under way at once never overlap, so each sector holds what was acknowledged
// last or, while no reply came, what was sent.
type disk struct {
	name  string // that its sectors are stamped with
	ticks *clock

	// Protects the fields below.
	mu      sync.Mutex
	now     []byte    // what was acknowledged
	sent    []*change // and may have happened
	claimed [][2]int64
	moments map[*moment]bool
}

func newDisk(name string, ticks *clock, content []byte) *disk {
	return &disk{name: name, ticks: ticks, now: content, moments: make(map[*moment]bool)}
}

// claim chooses a range that nobody else reads or changes until release. It fails
// where the disk is too busy.
func (k *disk) claim(rng *rand.Rand, most int64) (off, n int64, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for range 20 {
		off, n := randomRange(rng, int64(len(k.now)), most)
		taken := func(r [2]int64) bool { return off < r[1] && r[0] < off+n }
		if !slices.ContainsFunc(k.claimed, taken) {
			k.claimed = append(k.claimed, [2]int64{off, off + n})
			return off, n, true
		}
	}
	return 0, 0, false
}

func (k *disk) release(off int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.claimed = slices.DeleteFunc(k.claimed, func(r [2]int64) bool { return r[0] == off })
}

// send notes that data is about to be written at off.
func (k *disk) send(off int64, data []byte) *change {
	k.mu.Lock()
	defer k.mu.Unlock()
	c := &change{off: off, data: data, sent: k.ticks.tick()}
	k.sent = append(k.sent, c)
	for m := range k.moments {
		m.later = append(m.later, c)
	}
	return c
}

// ack notes that c is done, whatever was sent for its range before.
func (k *disk) ack(c *change) {
	k.mu.Lock()
	defer k.mu.Unlock()
	c.acked = k.ticks.tick()
	copy(k.now[c.off:], c.data)
	k.sent = slices.DeleteFunc(k.sent, func(o *change) bool { return o.off < c.end() && c.off < o.end() })
}

// refused notes that c was not done at all.
func (k *disk) refused(c *change) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sent = slices.DeleteFunc(k.sent, func(o *change) bool { return o == c })
}

// holds returns nil if p, read at off in a range that is claimed, is what the disk
// has there.
func (k *disk) holds(p []byte, off int64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return explain(k.name, p, k.now[off:off+int64(len(p))], off)
}

// content is a copy of what the disk has.
func (k *disk) content() []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	return bytes.Clone(k.now)
}

// settle takes content, which is all of the disk, for what has become of the
// changes without a reply, and nobody is at work on it any more. It returns an error
// where that cannot be.
func (k *disk) settle(content []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.claimed = nil
	if len(content) != len(k.now) {
		return fmt.Errorf("%s has %d bytes, want %d", k.name, len(content), len(k.now))
	}
	return k.settleLocked(content, 0)
}

// settleAt is settle for a range that is claimed.
func (k *disk) settleAt(p []byte, off int64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.settleLocked(p, off)
}

func (k *disk) settleLocked(p []byte, off int64) error {
	now := k.now[off : off+int64(len(p))]
	var rest []*change
	for _, c := range k.sent {
		switch {
		case c.off < off || c.end() > off+int64(len(p)):
			rest = append(rest, c)
		case !c.whole || bytes.Equal(p[c.off-off:c.end()-off], c.data):
			adopt(now[c.off-off:], p[c.off-off:], c.data)
		}
	}
	k.sent = rest
	return explain(k.name, p, now, off)
}

// adopt puts the sectors into now that content has from data.
func adopt(now, content, data []byte) {
	for i := 0; i < len(data); i += SectorSize {
		if bytes.Equal(content[i:i+SectorSize], data[i:i+SectorSize]) {
			copy(now[i:], data[i:i+SectorSize])
		}
	}
}

// moment is what a snapshot may hold: what was acknowledged before it was asked
// for, and of each sector any change that was on its way until the answer came.
type moment struct {
	base  []byte
	later []*change // in the order in which they were sent
}

// begin begins the time in which a snapshot is taken, end ends it.
func (k *disk) begin() *moment {
	k.mu.Lock()
	defer k.mu.Unlock()
	m := &moment{bytes.Clone(k.now), slices.Clone(k.sent)}
	k.moments[m] = true
	return m
}

func (k *disk) end(m *moment) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.moments, m)
}

// view is what an image says about the instant of its snapshot: a change that it
// has was sent at newest, one that it lacks was acknowledged at missing, if that is
// not 0.
type view struct{ newest, missing uint64 }

// join returns the view of two devices of one snapshot.
func (v view) join(o view) view {
	v.newest = max(v.newest, o.newest)
	if v.missing == 0 || o.missing != 0 && o.missing < v.missing {
		v.missing = o.missing
	}
	return v
}

// err returns an error where the image was not taken at one instant.
func (v view) err() error {
	if v.missing == 0 || v.missing > v.newest {
		return nil
	}
	return fmt.Errorf("lacks a change that was acknowledged at %d, and has one that was sent at %d", v.missing, v.newest)
}

// check returns an error where content is not what an image of the moment may hold.
func (m *moment) check(name string, content []byte) (view, error) {
	want := bytes.Clone(m.base)
	var v view
	for off, changes := range m.bySector() {
		s := content[off : off+SectorSize]
		old := bytes.Equal(s, m.base[off:off+SectorSize])
		first, last := -1, -1
		for i, c := range changes {
			if bytes.Equal(s, c.data[off-c.off:][:SectorSize]) {
				copy(want[off:], s)
				last = i
				if first < 0 {
					first = i
				}
			}
		}
		// Zeroes may be those of any change to zeroes: what must be counts.
		if !old && first >= 0 {
			v.newest = max(v.newest, changes[first].sent)
		}
		for _, c := range changes[last+1:] {
			if c.acked != 0 {
				v = v.join(view{missing: c.acked})
			}
		}
	}
	return v, explain(name, content, want, 0)
}

// bySector are the changes to each sector that has any.
func (m *moment) bySector() map[int64][]*change {
	sectors := make(map[int64][]*change)
	for _, c := range m.later {
		for off := c.off; off < c.end(); off += SectorSize {
			sectors[off] = append(sectors[off], c)
		}
	}
	return sectors
}

// explain returns nil if got, which was read at off, is want, and else says of the
// first sector that is not what each of them is.
func explain(name string, got, want []byte, off int64) error {
	if bytes.Equal(got, want) {
		return nil
	}
	if len(got) != len(want) {
		return fmt.Errorf("%s: %d bytes, want %d", name, len(got), len(want))
	}
	wrong, at := 0, int64(-1)
	for i := 0; i < len(got); i += SectorSize {
		if !bytes.Equal(got[i:i+SectorSize], want[i:i+SectorSize]) {
			wrong++
			if at < 0 {
				at = int64(i)
			}
		}
	}
	describe := func(s []byte) string {
		pass, err := Pass(s, name, off+at)
		if err != nil {
			return err.Error()
		}
		return fmt.Sprintf("pass %d", pass)
	}
	return fmt.Errorf("%s: %d sectors are others, the first at %d: got %s, want %s", name, wrong, off+at,
		describe(got[at:at+SectorSize]), describe(want[at:at+SectorSize]))
}

// The siege can only find what the model of a disk does not forgive.
func TestHistory(t *testing.T) {
	const n = 4 * SectorSize
	stamped := func(pass uint64) []byte {
		p := make([]byte, n)
		Stamp(p, "vda", 0, pass)
		return p
	}
	var ticks clock
	k := newDisk("vda", &ticks, stamped(1))
	k.ack(k.send(0, stamped(2)))
	m := k.begin()
	third := k.send(0, stamped(3))
	k.ack(third)
	fourth := k.send(0, stamped(4))
	k.end(m)
	if len(m.later) != 2 {
		t.Fatalf("changes of the moment: got %d, want 2", len(m.later))
	}
	mixed := append(stamped(4)[:SectorSize], stamped(2)[SectorSize:]...)
	for _, tc := range []struct {
		name    string
		content []byte
		right   bool
	}{
		{"what was acknowledged before", stamped(2), true},
		{"what was on its way", stamped(4), true},
		{"a change, and not one that was acknowledged before it was sent", mixed, false},
		{"less than what was acknowledged", stamped(1), false},
		{"what came later", stamped(5), false},
		{"zeroes", make([]byte, n), false},
	} {
		v, err := m.check("vda", tc.content)
		if err == nil {
			err = v.err()
		}
		if (err == nil) != tc.right {
			t.Errorf("an image with %s: got %v, want it to be right: %v", tc.name, err, tc.right)
		}
	}

	for _, tc := range []struct {
		name    string
		content []byte
		whole   bool
		right   bool
	}{
		{"some of a change without a reply", append(stamped(4)[:SectorSize], stamped(3)[SectorSize:]...), false, true},
		{"some of a change that is done at once", append(stamped(4)[:SectorSize], stamped(3)[SectorSize:]...), true, false},
		{"all of it", stamped(4), true, true},
		{"none of it", stamped(3), true, true},
		{"less than what was acknowledged", append(stamped(2)[:SectorSize], stamped(3)[SectorSize:]...), false, false},
	} {
		fourth.whole = tc.whole
		d := newDisk("vda", &ticks, stamped(3))
		d.sent = []*change{fourth}
		if err := d.settle(tc.content); (err == nil) != tc.right {
			t.Errorf("a device with %s: got %v, want it to be right: %v", tc.name, err, tc.right)
		}
	}
}
