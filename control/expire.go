// Snapshots that end by themselves.

package control

import (
	"context"
	"encoding/json"
	"time"

	"blksnap/cow"
)

// note is what is kept with a snapshot for the next start.
type note struct {
	TTL time.Duration `json:"ttl_ns,omitempty"`
}

func (n note) encode() []byte {
	if n == (note{}) {
		return nil
	}
	b, err := json.Marshal(n)
	if err != nil {
		panic("control: a note that cannot be encoded: " + err.Error())
	}
	return b
}

// noteOf reads what was kept. What cannot be read says nothing.
func noteOf(s *cow.Snapshot) (n note) {
	if json.Unmarshal(s.Note(), &n) != nil {
		return note{}
	}
	return n
}

// expires is when a snapshot ends by itself; the zero time for never.
func expires(s *cow.Snapshot) time.Time {
	if n := noteOf(s); n.TTL > 0 {
		return s.Created().Add(n.TTL)
	}
	return time.Time{}
}

// expireEvery is how late a snapshot may end.
const expireEvery = time.Second

// expire destroys snapshots whose time is over, also those in use, until ctx ends.
func (d *Daemon) expire(ctx context.Context) {
	tick := time.NewTicker(expireEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			d.expireAt(now)
		}
	}
}

func (d *Daemon) expireAt(now time.Time) {
	for _, s := range d.allSnapshots() {
		if end := expires(s); end.IsZero() || now.Before(end) || d.isRollingBack(s.Name()) {
			continue
		}
		d.record("snapshot-expired", "", s.Name(), "its time to live is over")
		if err := d.destroy(s.Name(), true); err != nil {
			d.log.Warn("destroy an expired snapshot", "snapshot", s.Name(), "err", err)
		}
	}
}
