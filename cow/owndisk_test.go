package cow

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestNextOfTheName removes a device while its state disk hangs, and adds it again: what
// is still to be done for the one before must not touch the state of the next one, which
// knows nothing of that before.
func TestNextOfTheName(t *testing.T) {
	for _, tc := range []struct{ name, call string }{
		{"the removal of the state hangs", "remove /state/devices/vda"},
		{"the last map of the device hangs", "create /state/devices/vda/map.new"},
	} {
		t.Run(tc.name, inBubble(func(t *testing.T) {
			l := newPowerLife(t)
			l.keep()
			l.take()
			l.must(l.snaps[0].Destroy(true))
			l.snaps = nil
			l.must(l.dev.noteTear(&tear{number: 1, snapshot: "s"}))
			was := l.dev.Changes().Generation()
			l.fact("remove", func(f *powerFacts) { f.generation, f.reserved, f.torn, f.mayTear = "", false, false, true })
			entered, release := l.hold(tc.call)
			if err := l.dev.Remove(); !errors.Is(err, errNoAnswer) {
				t.Errorf("remove over a state disk that hangs: %v, want no answer", err)
			}
			l.await(entered)
			begun := time.Now()
			l.open()
			l.inTime("add", begun, l.dev.cfg.PreserveLimit)
			if got := l.dev.Changes().Generation(); got == was {
				t.Error("the history of a device that was removed goes on")
			}
			time.Sleep(2 * checkpointEvery)
			l.put(1 << 20)
			note := begin(func() error { l.dev.findUnreadTear(); return nil })
			waitsOn(t, note, "a look for the note of a rollback")
			close(release)
			l.must(<-note)
			synctest.Wait()
			if l.dev.durable.Load() == nil {
				t.Fatal("nothing outlives the machine when the disk answers again")
			}
			if got := l.dev.State(); got != "ok" {
				t.Errorf("the device is %q when the disk answers again", got)
			}
			l.kept()
			l.fact("added", func(f *powerFacts) { f.mayTear = false })
			l.put(4 << regionShift)
			l.lose(0)
			l.lose(1)
		}))
	}
}
