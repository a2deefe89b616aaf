// Backing: how much a part can have, where others use the same file system.

package store

import "time"

// backing is what is known of it. A sparse file may find none long before its
// limit; then its part counts as full. The file system is asked each second, and
// after something was punched where there was none.
//
// What it says is not all: it counts blocks that were given out but not written
// yet as free, which the next write corrects, and it may be slow to show what was
// punched.
type backing struct {
	ceiling int64     // for how many blocks there is backing; may exceed the limit
	reached int64     // for how many there was lately
	missing int64     // blocks in use that were found to have none
	short   bool      // there is none, as far as is known
	punched time.Time // when something was last punched
}

// noteNoBacking is called when there was none for n blocks that were given out.
// The part gives out no more until survey finds some.
func (l *ledger) noteNoBacking(n int64) {
	l.backing.short, l.ahead = true, 0
	l.backing.missing += n
	l.backing.reached = l.backed()
}

// backed is how many blocks have backing, as far as is known.
func (l *ledger) backed() int64 { return max(0, l.used+l.spare-l.backing.missing) }

// unuse takes n blocks out of use. Those without backing are soon among them:
// who could not write them gives them back.
func (l *ledger) unuse(n int64) {
	l.used -= n
	l.backing.missing = max(0, l.backing.missing-n)
}

// showLag is how long a file system may take to show that something was punched:
// btrfs does so when it commits, each 30 s.
const showLag = time.Minute

// setCeiling is told that backing for avail more blocks can be had. What was
// punched lately may not be among them but counts: where that is wrong, the next
// write finds out.
func (l *ledger) setCeiling(avail int64, now time.Time) {
	if now.Sub(l.backing.punched) > showLag {
		l.backing.reached = 0
	}
	l.backing.short = false
	l.backing.reached = max(l.backing.reached, l.backed())
	l.backing.ceiling = max(l.backing.reached, l.backed()+min(avail, l.limit))
}

// lookAgain surveys a part that had no backing: what was punched may have made
// some.
func (p *Pool) lookAgain(l *ledger) {
	p.mu.Lock()
	short := l.backing.short
	p.mu.Unlock()
	if short {
		p.survey(l)
	}
}

// survey asks the part how much backing it can still have, and lets those go on
// who wait for it to work again.
func (p *Pool) survey(l *ledger) {
	avail, err := l.part.Avail()
	if err != nil {
		p.noteFailure(l, err)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	before := l.room()
	l.setCeiling(avail/BlockSize, time.Now())
	over := l.hungAt >= 0 && l.state() == nil
	if over {
		l.hungAt = -1
	}
	if over || l.room() > before {
		p.noteFreed()
	} else {
		p.noteSpace()
	}
}
