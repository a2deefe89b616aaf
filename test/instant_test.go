// A snapshot of several devices is one instant (docs/design.md, invariant 4).

package test

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A slot is a sector that one writer rewrites over and over. Slots lie far
// enough apart to share few chunks, and close enough to share some.
const (
	slotStride     = 20 * kiB
	slotsPerDevice = 12 // of each writer
)

// clock counts what happens at the writers: a write is sent at one tick and
// acknowledged at a later one. If one write's acknowledgement comes before
// another's sending, a snapshot with the second must have the first.
type clock struct{ atomic.Uint64 }

func (c *clock) tick() uint64 { return c.Add(1) }

// numbered is one write to a slot.
type numbered struct {
	sent, acked uint64 // ticks; acked is 0 where no reply came
}

// slot is what a writer did to one sector.
type slot struct {
	device string
	off    int64
	writes []numbered // the n-th write put n in the sector, counted from 1
}

func TestSnapshotIsOneInstant(t *testing.T) {
	needRoot(t)
	const size, writers, snapshots = 16 * miB, 6, 40
	dir := scratch(t)
	names := []string{"vda", "vdc"}
	// Writes in flight to a device between the two, in whichever order they are
	// taken, hold a snapshot up. If the first were open again meanwhile, or the
	// last still open, the writers would have time to show it.
	d := serve(t, makeOrigin(t, dir, "vda", size), "vdb="+slowOrigin(t, miB, 15*time.Millisecond), makeOrigin(t, dir, "vdc", size))

	var ticks clock
	var running sync.WaitGroup
	stop := make(chan struct{})
	var all [][]slot
	for i := range writers {
		// Every writer has a connection to each device, and uses them in any order.
		w := &writer{ticks: &ticks, rng: rand.New(rand.NewPCG(uint64(*seed), uint64(i)))}
		for _, name := range names {
			c := d.open(name)
			for range slotsPerDevice {
				w.slots = append(w.slots, slot{device: name, off: int64(i*len(names)*slotsPerDevice+len(w.slots)) * slotStride})
				w.conns = append(w.conns, c)
			}
		}
		all = append(all, w.slots)
		running.Go(func() {
			if err := w.run(stop); err != nil {
				t.Error(err)
			}
		})
	}
	for range 2 { // one at least is always in flight
		c := d.open("vdb")
		running.Go(func() {
			if err := holdUp(c, stop); err != nil {
				t.Error(err)
			}
		})
	}
	t.Logf("repeat with -seed=%d", *seed)
	stopped := sync.OnceFunc(func() {
		close(stop)
		running.Wait()
	})
	defer stopped()

	const atOnce = 6
	held := map[string]map[*slot]uint64{}
	for n := range snapshots {
		name := fmt.Sprint("s", n)
		mkdir(t, d.snapshot(name))
		held[name] = readSlots(t, d, name, all)
		if n >= atOnce { // an older one still says the same
			old := fmt.Sprint("s", n-atOnce)
			if again := readSlots(t, d, old, all); !maps.Equal(again, held[old]) {
				t.Errorf("snapshot %s changed", old)
			}
			rmdir(t, d.snapshot(old))
		}
	}
	stopped()
	if t.Failed() {
		return
	}
	for name, slots := range held {
		if err := checkInstant(slots); err != nil {
			t.Errorf("snapshot %s: %v", name, err)
		}
	}
	t.Logf("%d snapshots, %d ticks of %d writers", snapshots, ticks.Load(), writers)
}

// holdUp keeps a write in flight.
func holdUp(c *nbdConn, stop <-chan struct{}) error {
	p := make([]byte, 4*kiB)
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		if err := c.writeAt(p, 0); err != nil {
			return fmt.Errorf("slow write: %w", err)
		}
	}
}

// writer writes its slots in random order, each write after the last one was
// acknowledged.
type writer struct {
	ticks *clock
	rng   *rand.Rand
	slots []slot
	conns []*nbdConn // that of each slot
}

func (w *writer) run(stop <-chan struct{}) error {
	p := make([]byte, SectorSize)
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		i := w.rng.IntN(len(w.slots))
		s := &w.slots[i]
		Stamp(p, s.device, s.off, uint64(len(s.writes))+2) // the origins were made in pass 1
		write := numbered{sent: w.ticks.tick()}
		if err := w.conns[i].writeAt(p, s.off); err != nil {
			return fmt.Errorf("write %s at %d: %w", s.device, s.off, err)
		}
		write.acked = w.ticks.tick()
		s.writes = append(s.writes, write)
	}
}

// readSlots returns the number of the write that each slot holds in a
// snapshot: 0 for what was there before the first.
func readSlots(t *testing.T, d *daemon, snapshot string, all [][]slot) map[*slot]uint64 {
	t.Helper()
	images := map[string]*os.File{}
	held := map[*slot]uint64{}
	for _, slots := range all {
		for i := range slots {
			s := &slots[i]
			if images[s.device] == nil {
				f, err := os.Open(d.snapshot(snapshot, s.device+".img"))
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				images[s.device] = f
			}
			pass, err := Pass(readAt(t, images[s.device], s.off, SectorSize), s.device, s.off)
			if err != nil {
				t.Fatalf("snapshot %s: %v", snapshot, err)
			}
			held[s] = max(pass, 1) - 1
		}
	}
	return held
}

// checkInstant returns an error if a slot lacks a write that was acknowledged
// before any write that the snapshot holds was sent.
func checkInstant(held map[*slot]uint64) error {
	var newest numbered
	var holder *slot
	for s, n := range held {
		if n > 0 && s.writes[n-1].sent > newest.sent {
			newest, holder = s.writes[n-1], s
		}
	}
	for s, n := range held {
		if n < uint64(len(s.writes)) && s.writes[n].acked < newest.sent {
			return fmt.Errorf("%s at %d holds write %d; write %d was acknowledged at %d, "+
				"before a write to %s at %d that the snapshot holds was sent, at %d",
				s.device, s.off, n, n+1, s.writes[n].acked, holder.device, holder.off, newest.sent)
		}
	}
	return nil
}

// The test above can only fail if checkInstant finds what it looks for.
func TestCheckInstant(t *testing.T) {
	a := &slot{device: "vda", writes: []numbered{{sent: 1, acked: 2}}}
	b := &slot{device: "vdb", writes: []numbered{{sent: 3, acked: 4}}}
	for _, tc := range []struct {
		name  string
		held  map[*slot]uint64
		wrong bool
	}{
		{"neither", map[*slot]uint64{a: 0, b: 0}, false},
		{"both", map[*slot]uint64{a: 1, b: 1}, false},
		{"the earlier alone", map[*slot]uint64{a: 1, b: 0}, false},
		{"the later alone", map[*slot]uint64{a: 0, b: 1}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := checkInstant(tc.held); (err != nil) != tc.wrong {
				t.Errorf("checkInstant\n got %v\nwant an error: %v", err, tc.wrong)
			}
		})
	}
}

// Many connections write a model of each sector while images are compared to
// it; snapshots are destroyed in any order.
func TestImagesEqualTheModel(t *testing.T) {
	needRoot(t)
	const size, connections, rounds, batch, atMost = 4 * miB, 4, 25, 100, 5
	rng := rand.New(rand.NewPCG(uint64(*seed), 1))
	t.Logf("repeat with -seed=%d", *seed)
	d, _ := serveOrigin(t, size)
	model := make([]uint64, size/SectorSize) // the pass of each sector
	for i := range len(model) / 2 {
		model[i] = 1
	}
	var conns []*nbdConn
	for range connections {
		conns = append(conns, d.open("vda"))
	}

	images := map[string][]uint64{}
	pass := uint64(1)
	for round := range rounds {
		name := fmt.Sprint("s", round)
		mkdir(t, d.snapshot(name))
		images[name] = append([]uint64(nil), model...)

		// Each connection has a part of the device to itself, so that what
		// it writes ends up in the model in the same order.
		var writers sync.WaitGroup
		for i, c := range conns {
			part := model[i*len(model)/connections : (i+1)*len(model)/connections]
			first := int64(i*len(model)/connections) * SectorSize
			rng := rand.New(rand.NewPCG(rng.Uint64(), 2))
			from := pass
			writers.Go(func() {
				for n := range uint64(batch) {
					if err := changeSomething(c, rng, part, first, from+n+1); err != nil {
						t.Errorf("round %d, connection %d: %v", round, i, err)
						return
					}
				}
			})
		}
		writers.Wait()
		pass += batch

		for name, want := range images {
			checkImage(t, d, name, want)
		}
		for len(images) > atMost || len(images) > 0 && rng.IntN(4) == 0 {
			for name := range images { // any one
				destroy(t, d, name)
				delete(images, name)
				break
			}
		}
		if t.Failed() {
			return
		}
	}
}

// changeSomething writes, zeroes or trims some of the sectors that model
// describes; they begin at first. A trim may leave what was there or zeroes,
// so it is written over.
func changeSomething(c *nbdConn, rng *rand.Rand, model []uint64, first int64, pass uint64) error {
	i, length := randomRange(rng, int64(len(model))*SectorSize, 100*kiB)
	off := first + i
	switch rng.IntN(8) {
	case 0:
		pass = 0
		if err := c.zero(off, length); err != nil {
			return fmt.Errorf("zero %d at %d: %w", length, off, err)
		}
	case 1:
		if err := c.trim(off, length); err != nil {
			return fmt.Errorf("trim %d at %d: %w", length, off, err)
		}
		fallthrough
	default:
		p := make([]byte, length)
		Stamp(p, "vda", off, pass)
		if err := c.writeAt(p, off); err != nil {
			return fmt.Errorf("write %d at %d: %w", length, off, err)
		}
	}
	for b := i / SectorSize; b < (i+length)/SectorSize; b++ {
		model[b] = pass
	}
	return nil
}

// checkImage compares the whole of an image, read as a file and as an export,
// to the passes of its sectors.
func checkImage(t *testing.T, d *daemon, snapshot string, want []uint64) {
	t.Helper()
	file, err := os.ReadFile(d.snapshot(snapshot, "vda.img"))
	if err != nil {
		t.Fatal(err)
	}
	if got := len(file); got != len(want)*SectorSize {
		t.Fatalf("%s has %d bytes, want %d", snapshot, got, len(want)*SectorSize)
	}
	export := make([]byte, len(file))
	c := d.open("vda@" + snapshot)
	defer c.Close()
	for off := 0; off < len(export); off += miB {
		if err := c.readAt(export[off:min(off+miB, len(export))], int64(off)); err != nil {
			t.Fatalf("read export vda@%s at %d: %v", snapshot, off, err)
		}
	}
	read := map[string][]byte{"file": file}
	if !bytes.Equal(export, file) { // then one of them is wrong, or both
		read["export"] = export
	}
	for how, content := range read {
		for i, pass := range want {
			off := int64(i) * SectorSize
			if err := Verify(content[off:off+SectorSize], "vda", off, pass, pass); err != nil {
				t.Fatalf("snapshot %s as a %s: %v", snapshot, how, err)
			}
		}
	}
}
